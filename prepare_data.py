"""Text in, token numbers out: DIR/train.bin, DIR/val.bin and DIR/meta.json.

    python prepare_data.py shakespeare                      -> data/shakespeare_char
    python prepare_data.py file novel.txt --out data/novel  -> data/novel

The way of the data, a megabyte at a time; each file is whole at the end, or not there:

    text files      DIR/input.txt if it is there; else a download, Python's own library, or yours
    pieces          UTF-8 checked; nine tenths of the bytes train, the rest, 10 MB at most, does not
    token numbers   by characters, bytes, or GPT-2's vocabulary; uint16, or uint32 beyond 65,536
    meta.json       all that turns numbers into text again, and nats a token into bits a byte
"""

import codecs
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import sysconfig
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import urlretrieve

import numpy as np
import tiktoken
import tyro
from filelock import FileLock
from tqdm import tqdm

from hsm import BadInput

CHUNK = 2**20  # bytes read at a time
# Each corpus, and the tokenizer that suits it.
CORPORA = {"shakespeare": "char", "tinystories": "gpt2", "openwebtext": "gpt2", "stdlib": "byte"}
FOLDERS = [f"{corpus}_{kind}" for corpus in CORPORA for kind in ("char", "byte", "gpt2")]
GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
URLS = {
    "shakespeare": f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStories-train.txt",
}
SHA256 = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


class Tokenizer:
    """Text to token numbers and back, from meta.json: "tokenizer", and for "char" a str "vocab"."""

    def __init__(self, meta):
        self.kind, self.vocab, self.bpe = meta["tokenizer"], meta.get("vocab", ""), None
        self.number = {c: i for i, c in enumerate(self.vocab)}
        self.vocab_size = {"char": len(self.vocab), "byte": 256, "gpt2": 50257}[self.kind]
        self.start = {"char": self.number.get("\n", 0), "byte": 10, "gpt2": 50256}[self.kind]
        if self.kind == "gpt2":
            try:
                self.bpe = tiktoken.get_encoding("gpt2")  # downloaded once, then kept
            except Exception as error:  # the network's, and those of a broken copy
                words = "connect once, set TIKTOKEN_CACHE_DIR, or choose --tokenizer char or byte"
                raise BadInput(f"GPT-2's vocabulary is not here: {words}") from error

    def encode(self, text):
        """Token numbers of a str, a 1-D integer array. BadInput names a character not known."""
        if self.kind == "byte":
            return np.frombuffer(text.encode("utf-8"), np.uint8)
        if self.kind == "gpt2":
            return np.array(self.bpe.encode(text, allowed_special="all"), dtype=np.uint32)
        if unknown := sorted(set(text) - set(self.number)):
            words = f"the {self.vocab_size} of this vocabulary; --tokenizer byte knows all"
            raise BadInput(f"the character {unknown[0]!r} is not among {words}")
        return np.array([self.number[c] for c in text], dtype=np.uint32)

    def decode_bytes(self, tokens):
        """UTF-8 bytes of token numbers; a single token may be a part of a character."""
        tokens = [t for t in tokens if t < self.vocab_size]  # a model may have spare rows
        if self.kind == "char":
            return "".join(self.vocab[t] for t in tokens).encode("utf-8")
        return bytes(tokens) if self.kind == "byte" else self.bpe.decode_bytes(tokens)

    def decode(self, tokens):
        """Text of token numbers; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")


def say(text, file=None):
    """Print; where nobody can read it any more (a closed pipe, a full disk), that is no error."""
    try:
        tqdm.write(text, file)
        (file or sys.stdout).flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


@contextmanager
def atomic_write(path):
    """Yield a path beside `path` that becomes it at the end; a full disk, say, is a BadInput."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error})") from error  # which names the file
    finally:
        temporary.unlink(missing_ok=True)


def download(url, path, sha256=""):
    """Fetch url to path, whole or not at all. BadInput for whatever the network does."""
    socket.setdefaulttimeout(20)  # seconds without a byte
    with atomic_write(path) as temporary, tqdm(unit="B", unit_scale=True, disable=None) as bar:
        try:  # it raises if the answer is shorter than announced
            _, headers = urlretrieve(url, temporary, lambda i, n, _: bar.update(n if i else 0))
            odd = headers.get_content_type() == "text/html" or not temporary.stat().st_size
            if odd or (sha256 and hashlib.sha256(temporary.read_bytes()).hexdigest() != sha256):
                raise ValueError("a web page, nothing, or not the text that we know")
        except Exception as error:  # sockets, proxies and servers each have errors of their own
            words = f"put the text at {path} yourself, or: python prepare_data.py stdlib"
            raise BadInput(f"cannot download {url} ({error!r:.200}); {words}") from error


def write_stdlib(path):
    """Python's own library but for tests, shuffled by a hash of its modules' names, to one file."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = (file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    with atomic_write(path) as temporary, open(temporary, "wb") as output:
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
            source = b"" if left_out & {*name.split("/")} else (root / name).read_bytes()
            if source.decode("utf-8", "ignore").encode("utf-8") == source:  # a few are in Latin-1
                output.write(source.replace(b"\r\n", b"\n"))
        if not output.tell():
            raise BadInput(f"this Python has no library in source form at {root}")


def write_openwebtext(path, max_docs):
    """OpenWebText's documents, or the first max_docs, streamed to one text file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as output:
        try:  # the hub's own parquet copy: new versions of datasets run no scripts
            from datasets import load_dataset

            where = {"path": "Skylion007/openwebtext", "revision": "refs/convert/parquet"}
            rows = load_dataset(**where, streaming=True, split="train")
            for row in tqdm(rows.take(max_docs) if max_docs else rows, unit="doc", disable=None):
                output.write((row["text"] + "<|endoftext|>").encode("utf-8", "replace"))
        except Exception as error:  # pyarrow, datasets and the hub each have errors of their own
            words = 'it needs a network and: pip install "datasets>=3,<6"'
            raise BadInput(f"cannot stream OpenWebText ({error!r}); {words}") from error


def text_files(corpus, source, folder, max_docs=0):
    """The files that hold a corpus's text, fetched to folder/input.txt if they are not here yet."""
    if corpus == "file":
        path, files = Path(source), [Path(source)]
        if source and path.is_dir():  # its visible .txt files
            files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() == ".txt"]
            files = [f for f in files if "/." not in f"/{f.relative_to(path).as_posix()}"]
            files = sorted({f.resolve() for f in files if f.is_file()})  # a link adds none
            say(f"{path}: {len(files)} visible .txt files")
        if not files or not files[0].is_file():
            raise BadInput(f"no text at {source!r}: give a file, or a folder with .txt files")
        return files
    path = folder / "input.txt"
    if path.is_file() and max_docs:
        raise BadInput(f"{path} is there already; delete it to fetch {max_docs} documents")
    if not path.is_file() and corpus in URLS:
        download(URLS[corpus], path, SHA256.get(corpus, ""))
    elif not path.is_file():
        write_stdlib(path) if corpus == "stdlib" else write_openwebtext(path, max_docs)
    return [path]


def read_pieces(files, digest=None):
    """The files' text one after the other, in pieces that can be encoded each by itself.

    A piece ends before white space that follows something else, where no GPT-2 token goes across.
    Only a megabyte without any blank or new line is cut as it comes. A BOM at the start is no text.
    """
    for path in files:
        decoder, rest, block = codecs.getincrementaldecoder("utf-8-sig")(), "", b"-"
        with open(path, "rb") as file:
            while block:
                block = file.read(CHUNK)
                if digest:
                    digest.update(block)
                try:
                    rest += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    place = max(0, file.tell() - len(block) + error.start)
                    raise BadInput(f"{path} is not UTF-8 text (near byte {place:,})") from error
                cut = len(rest[: 1 + max(rest.rfind("\n"), rest.rfind(" "))].rstrip())
                cut = cut if cut and block else len(rest)
                yield rest[:cut]
                rest = rest[cut:]


def prepare(corpus, source="", tokenizer="auto", folder="", max_docs=0):
    """Make folder/{train.bin,val.bin,meta.json} as PrepareConfig, below, says. Returns the meta."""
    if max_docs < 0 or (max_docs and corpus != "openwebtext") or (source and corpus != "file"):
        raise BadInput("max_docs, 0 or more, is for openwebtext alone, and a path for file alone")
    tokenizer = CORPORA.get(corpus, "char") if tokenizer == "auto" else tokenizer
    folder = Path(folder or f"data/{corpus}_{tokenizer}")
    meta, digest = {"corpus": corpus, "tokenizer": tokenizer}, hashlib.sha256()
    with ExitStack() as stack:
        stack.enter_context(FileLock(folder / ".lock"))  # who else prepares this folder ends first
        files = text_files(corpus, source, folder, max_docs)
        total = sum(path.stat().st_size for path in files)
        if tokenizer == "char":  # the alphabet must be known before the first number is written
            meta["vocab"] = "".join(sorted(set().union(*map(set, read_pieces(files)))))
        tokens = Tokenizer(meta)
        dtype = np.dtype("<u2" if tokens.vocab_size <= 2**16 else "<u4")
        meta |= {"vocab_size": tokens.vocab_size, "dtype": dtype.name}
        meta |= dict.fromkeys(("train_tokens", "train_bytes", "val_tokens", "val_bytes"), 0)
        outputs = {}
        for split in ("train", "val"):
            temporary = stack.enter_context(atomic_write(folder / f"{split}.bin"))
            outputs[split] = stack.enter_context(open(temporary, "wb"))
        n_left = max(total * 9 // 10, total - 10**7)  # bytes that still train
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=None))
        for piece in read_pieces(files, digest):
            head = piece.encode("utf-8")[: max(0, n_left)].decode("utf-8", "ignore")
            for split, part in (("train", head), ("val", piece[len(head) :])):
                numbers, n_bytes = tokens.encode(part), len(part.encode("utf-8"))
                outputs[split].write(numbers.astype(dtype).tobytes())
                meta[f"{split}_tokens"] += len(numbers)
                meta[f"{split}_bytes"] += n_bytes
                n_left -= n_bytes
                bar.update(n_bytes)
        if min(meta["train_tokens"], meta["val_tokens"]) < 2:
            raise BadInput(f"{files[0]} is too short ({total} bytes) to train and to validate")
        (folder / "meta.json").unlink(missing_ok=True)  # never an old one beside new numbers
    meta["sha256"] = digest.hexdigest()
    with atomic_write(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    say(f"{folder}: {meta['train_tokens']:,} tokens train, {meta['val_tokens']:,} validate")
    return meta


def read_meta(folder):
    """meta.json as a dict. Raises BadInput if it is missing or damaged."""
    path, source = Path(folder) / "meta.json", Path(folder) / "input.txt"
    if not path.is_file():
        raise BadInput(f"{path} is missing: python prepare_data.py file PATH --out {folder}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        sizes = [meta[f"{split}_{of}"] for split in ("train", "val") for of in ("tokens", "bytes")]
        good = min(*sizes, meta["vocab_size"]) > 0 and meta["dtype"] in ("uint16", "uint32")
        good = good and meta["tokenizer"] in ("char", "byte", "gpt2")
        good = good and len(meta.get("vocab", "")) in (0, meta["vocab_size"])
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise BadInput(f"{path} is damaged; delete {folder} and prepare it again")
    if source.is_file() and source.stat().st_mtime > path.stat().st_mtime:
        say(f"note: {source} is newer than what was prepared from it; delete {path} to prepare")
    return meta


def bits_per_byte(loss, meta):
    """A validation loss in nats a token, as bits a byte: comparable across tokenizers."""
    return loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]


# ---- Command lines, this one and those of train.py and sample.py ---------------------------------
def parse(config_type, arguments, description, default=tyro.MISSING_NONPROP):
    """A config_type from command-line words; tyro says what is wrong, and exits with status 2."""
    words = sys.argv[1:] if arguments is None else arguments  # also nanoGPT's --flag=True, =False
    words = [re.sub(r"^(--(?!prompt)[\w-]+)=(?i:true)$", r"\1", word) for word in words]
    words = [re.sub(r"^--(?!prompt)([\w-]+)=(?i:false)$", r"--no-\1", word) for word in words]
    return tyro.cli(config_type, args=words, description=description, default=default)


def run(main):
    """Run main() as a program: bad input and what the system refuses are one line and status 2."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):  # whatever its encoding, print on
        with suppress(AttributeError):  # a notebook's streams have none
            stream.reconfigure(errors="replace")
    status, words = 2, ""
    try:
        status = main() or 0
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        status, words = 130, "stopped"  # 128 + SIGINT, as shells count
    except (BadInput, OSError) as error:
        words = str(error)  # an OSError names the file
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        words = "too little memory: choose a smaller --batch-size, --block-size or --n-embd"
    if words:
        say(f"{Path(sys.argv[0]).name}: {words}", sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo may abort the usual end
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@dataclass
class PrepareConfig:
    """What the command line takes."""

    corpus: tyro.conf.Positional[Literal[(*CORPORA, "file")]]
    path: tyro.conf.Positional[str] = ""  # for "file": a text file, or a folder of .txt files
    tokenizer: Literal["auto", "char", "byte", "gpt2"] = "auto"  # auto: what suits the corpus
    out: str = ""  # folder to write; by default data/<corpus>_<tokenizer>
    max_docs: int = 0  # openwebtext: only the first so many documents; 0: all


def main(arguments=None):
    config = parse(PrepareConfig, arguments, "Turn a text corpus into token numbers.")
    prepare(config.corpus, config.path, config.tokenizer, config.out, config.max_docs)


if __name__ == "__main__":
    run(main)
