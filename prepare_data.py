"""Text in, token numbers out: DIR/train.bin, DIR/val.bin and DIR/meta.json.

    python prepare_data.py shakespeare                      -> data/shakespeare_char
    python prepare_data.py file novel.txt --out data/novel  -> data/novel

The way of the data, in chunks of about a megabyte, so that a file may be larger than memory:

    corpus  ->  text files     DIR/input.txt if it is there; else a download, Python's own library,
                               or your files where they lie
            ->  chunks         UTF-8 checked; the first nine tenths of the bytes train, the rest
                               (at most 10 MB) validates
            ->  token numbers  by characters, bytes, or GPT-2's vocabulary
            ->  DIR            uint16 numbers (uint32 for vocabularies beyond 65,536), and meta.json

meta.json holds all that turns numbers into text again and a loss a token into bits a byte. Each
file is written beside its place and then moved there: it is whole, or it is not there.
"""

import codecs
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import urllib.request
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from hsm import BadInput, atomic_write

END_OF_TEXT = "<|endoftext|>"  # between documents; one token in GPT-2's vocabulary
CHUNK = 2**20  # bytes read at a time


@dataclass
class Corpus:
    """Where a corpus comes from, and the tokenizer that suits it."""

    tokenizer: str
    url: str = ""  # a text file
    sha256: str = ""  # of that file, where we know it


CORPORA = {
    "shakespeare": Corpus(
        "char",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "stdlib": Corpus("byte"),
    "tinystories": Corpus(
        "gpt2",
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-train.txt",
    ),
    "openwebtext": Corpus("gpt2"),
    "file": Corpus("char"),
}

# ------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer:
    """Text to token numbers and back, from what meta.json says.

    meta: a dict with "tokenizer" ("char", "byte" or "gpt2") and, for "char", "vocab": a string of
    all characters in the order of their code points.
    """

    def __init__(self, meta):
        self.kind = meta["tokenizer"]
        if self.kind == "char":
            self.codes = np.array([ord(c) for c in meta["vocab"]], dtype=np.uint32)
            self.vocab_size = len(self.codes)
        elif self.kind == "byte":
            self.vocab_size = 256
        else:
            self.bpe = load_gpt2()
            self.vocab_size = self.bpe.n_vocab

    def encode(self, text):
        """Token numbers of a str, a 1-D integer array. BadInput names a character not known."""
        if self.kind == "byte":  # surrogates stand for stray bytes on a command line
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        if self.kind == "gpt2":
            return np.array(self.bpe.encode(text, allowed_special="all"), dtype=np.uint32)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        numbers = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = codes[self.codes[numbers] != codes]
        if unknown.size:
            raise BadInput(
                f"the character {chr(unknown[0])!r} is not among the {self.vocab_size} that this "
                "vocabulary knows; leave it out, or prepare the data with --tokenizer byte"
            )
        return numbers

    def decode_bytes(self, tokens):
        """UTF-8 bytes of token numbers; a single token may be a part of a character."""
        tokens = [t for t in tokens if t < self.vocab_size]  # a model may have spare rows
        if self.kind == "byte":
            return bytes(tokens)
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(tokens)
        return "".join(chr(self.codes[t]) for t in tokens).encode("utf-8")

    def decode(self, tokens):
        """Text of token numbers; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    @property
    def start(self):
        """The token that a text without a prompt starts from: a new line, or GPT-2's own."""
        if self.kind == "gpt2":
            return self.bpe.eot_token
        newline = np.flatnonzero(self.codes == 10) if self.kind == "char" else [10]
        return int(newline[0]) if len(newline) else 0


def load_gpt2():
    """GPT-2's byte pair encoding (tiktoken downloads it once and keeps it)."""
    import tiktoken  # here, because most readers start without it

    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # the network's errors are OSErrors
        raise BadInput(
            "GPT-2's vocabulary is not here and cannot be downloaded: connect to a network once, "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or choose --tokenizer char or byte"
        ) from error


# ------------------------------------------------------------------------------------------------
# Corpus -> text files


def download(url, path, sha256=""):
    """Fetch url to path, whole or not at all. BadInput without a network, or if it differs."""
    request = urllib.request.Request(url, headers={"User-Agent": "hsm"})
    digest, size = hashlib.sha256(), 0
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            with urllib.request.urlopen(request, timeout=20) as reply:
                total = int(reply.headers.get("Content-Length") or 0)
                with tqdm(desc="download", total=total or None, unit="B", unit_scale=True) as bar:
                    while block := reply.read(CHUNK):
                        file.write(block)
                        digest.update(block)
                        size += len(block)
                        bar.update(len(block))
            if total and size != total:
                raise BadInput(f"the download of {url} broke off; try again")
            if sha256 and digest.hexdigest() != sha256:
                raise BadInput(f"{url} is not the file that we know (its sha256 differs)")
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # no network, time-out, a refusal, a torn answer
        raise BadInput(
            f"cannot download {url} ({error}); put the text at {path} yourself, "
            "or train on what needs no network: python prepare_data.py stdlib"
        ) from error


def write_stdlib(path):
    """Python's standard library, this reader's own: real text and code without a download.

    Modules in the order of their paths; without tests, and without what pip installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    with atomic_write(path) as temporary, open(temporary, "wb") as output:
        for name in names:
            if left_out.isdisjoint(name.split("/")):
                source = (root / name).read_bytes()
                try:
                    source.decode("utf-8")
                except UnicodeDecodeError:
                    continue  # two or three modules are in Latin-1
                output.write(source.replace(b"\r\n", b"\n"))
    if not path.stat().st_size:
        path.unlink()
        raise BadInput(f"this Python has no library in source form at {root}; use another corpus")


def documents(source):
    """The texts of OpenWebText (or of a local .parquet or .jsonl file), streamed one by one."""
    try:
        import datasets
    except ImportError as error:
        raise BadInput('this needs one more package: pip install "datasets>=3,<6"') from error
    form = {"streaming": True, "split": "train"}
    try:
        if not source:  # the hub's own parquet copy: new versions of datasets run no scripts
            rows = datasets.load_dataset(
                "Skylion007/openwebtext", revision="refs/convert/parquet", **form
            )
        else:
            kind = "parquet" if source.suffix == ".parquet" else "json"
            rows = datasets.load_dataset(kind, data_files=str(source), **form)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise BadInput(f'the documents in {source or "OpenWebText"} have no field "text"')
            yield row["text"]
    except BadInput:
        raise
    except Exception as error:  # pyarrow, datasets and the hub each have errors of their own
        what = f"read {source}" if source else "stream OpenWebText (is there a network?)"
        first = (str(error).splitlines() or [""])[0][:200]
        raise BadInput(f"cannot {what}: {type(error).__name__}: {first}") from error


def write_documents(path, source, max_docs):
    """All documents, or the first max_docs, to one text file, END_OF_TEXT behind each."""
    with (
        tqdm(documents(source), "documents", max_docs or None, unit="doc") as texts,
        atomic_write(path) as temporary,
        open(temporary, "wb") as output,
    ):
        for n, text in enumerate(texts, start=1):
            output.write((text + END_OF_TEXT).encode("utf-8", "replace"))
            if n == max_docs:
                break


def text_files(corpus, source, folder, max_docs=0):
    """The files that hold a corpus's text, fetched to folder/input.txt if they are not here yet.

    source: "", or a local copy: a text file, a folder of .txt files, a .parquet or a .jsonl file.
    """
    if source:
        source = Path(source)
        if source.is_dir():
            files = sorted(source.rglob("*.txt"))
            if not files:
                raise BadInput(f"the folder {source} has no .txt files")
            return files
        if not source.is_file():
            raise BadInput(f"there is no file or folder {source}")
        if source.suffix not in (".parquet", ".jsonl"):
            return [source]
    elif corpus == "file":
        raise BadInput("say which file: python prepare_data.py file PATH")
    path = folder / "input.txt"
    if source or corpus == "openwebtext":  # for another source or max_docs, delete input.txt
        if source or not path.is_file():
            write_documents(path, source, max_docs)
    elif not path.is_file():
        if corpus == "stdlib":
            write_stdlib(path)
        else:
            download(CORPORA[corpus].url, path, CORPORA[corpus].sha256)
    return [path]


# ------------------------------------------------------------------------------------------------
# Text files -> chunks -> token numbers


def read_chunks(files, digest=None):
    """The files' text one after the other, in pieces that can be encoded each by itself.

    A piece ends before a white-space character that follows another character. There no GPT-2
    token goes across (its words bring the space before them along), so the pieces' tokens are the
    text's. Only a stretch of 16 chunks without any white space is cut as it comes.
    """
    for path in files:
        decoder, rest, n_read = codecs.getincrementaldecoder("utf-8")(), "", 0
        with open(path, "rb") as file:
            while True:
                block = file.read(CHUNK)
                if digest is not None:
                    digest.update(block)
                try:
                    rest += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    where = n_read + max(0, error.start)
                    raise BadInput(f"{path} is not UTF-8 text (near byte {where:,})") from error
                if not block:
                    break
                n_read += len(block)
                found = re.search(r".*\S(?=\s)", rest, re.DOTALL)  # greedy: the last such place
                cut = found.end() if found else 0
                if not cut and len(rest) > 16 * CHUNK:
                    cut = len(rest)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
        if rest:
            yield rest


def split_chunks(chunks, n_train):
    """(split, piece) pairs: "train" for the first n_train bytes of all chunks, then "val"."""
    for chunk in chunks:
        size = len(chunk.encode("utf-8"))
        if 0 < n_train < size:
            head = chunk.encode("utf-8")[:n_train].decode("utf-8", "ignore")
            yield "train", head
            yield "val", chunk[len(head) :]
        else:
            yield ("train" if n_train > 0 else "val"), chunk
        n_train -= size


def prepare(corpus, source="", tokenizer="auto", folder="", max_docs=0):
    """Make folder/{train.bin,val.bin,meta.json} and return the meta dict.

    corpus: a name in CORPORA.  source: your own file or folder of text, for "file", or a local
    copy of a corpus.  tokenizer: "char", "byte", "gpt2", or "auto": the one that suits the corpus.
    folder: by default data/<corpus>_<tokenizer>.  max_docs: only so many documents, if not 0.
    """
    if tokenizer == "auto":
        tokenizer = CORPORA[corpus].tokenizer
    folder = Path(folder or f"data/{corpus}_{tokenizer}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.tmp"):  # half-written by a run that was killed
        path.unlink()
    files = text_files(corpus, source, folder, max_docs)
    total = sum(path.stat().st_size for path in files)
    if not total:
        raise BadInput(f"{files[0]} is empty")

    meta = {"corpus": corpus, "tokenizer": tokenizer}
    if tokenizer == "char":  # the alphabet must be known before the first number is written
        alphabet = set()
        for chunk in tqdm(read_chunks(files), desc="characters", unit="chunk"):
            alphabet.update(chunk)
        meta["vocab"] = "".join(sorted(alphabet))
    tokens = Tokenizer(meta)
    dtype = np.dtype("<u2" if tokens.vocab_size <= 2**16 else "<u4")
    meta |= {"vocab_size": tokens.vocab_size, "dtype": dtype.name}

    digest, counts = hashlib.sha256(), dict.fromkeys(("train", "val"), (0, 0))
    n_train = max(total * 9 // 10, total - 10**7)
    with (
        tqdm(desc="tokens", total=total, unit="B", unit_scale=True) as bar,
        atomic_write(folder / "train.bin") as train,
        atomic_write(folder / "val.bin") as val,
        open(train, "wb") as train_file,
        open(val, "wb") as val_file,
    ):
        outputs = {"train": train_file, "val": val_file}
        for split, piece in split_chunks(read_chunks(files, digest), n_train):
            numbers, size = tokens.encode(piece), len(piece.encode("utf-8"))
            outputs[split].write(numbers.astype(dtype).tobytes())
            counts[split] = (counts[split][0] + len(numbers), counts[split][1] + size)
            bar.update(size)
        if min(counts["train"][0], counts["val"][0]) < 2:
            raise BadInput(
                f"{files[0]} is too short ({total} bytes): both its first nine tenths and "
                "the rest must hold two tokens or more"
            )
        (folder / "meta.json").unlink(missing_ok=True)  # never an old one beside new numbers
    for split, (n_tokens, n_bytes) in counts.items():
        meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": n_bytes}
    meta["bytes_per_token"] = round(total / (meta["train_tokens"] + meta["val_tokens"]), 4)
    meta["sha256"] = digest.hexdigest()
    with (
        atomic_write(folder / "meta.json") as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        json.dump(meta, file, indent=1, ensure_ascii=True)
    return meta


# ------------------------------------------------------------------------------------------------
# Reading it back


def read_meta(folder):
    """meta.json as a dict, every field checked. Raises BadInput if it is missing or damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise BadInput(
            f"{folder} has no meta.json; make it: python prepare_data.py file PATH --out {folder}"
        )
    damaged = BadInput(f"{path} is damaged; delete {folder} and prepare it again")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        numbers = ("vocab_size", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
        good = all(type(meta[name]) is int and 0 < meta[name] < 2**60 for name in numbers)
        good &= meta["tokenizer"] in ("char", "byte", "gpt2")
        good &= meta["dtype"] in ("uint16", "uint32")
        good &= meta["vocab_size"] < 2**31
        if meta["tokenizer"] == "char":
            vocab = meta["vocab"]
            good &= isinstance(vocab, str) and len(vocab) == meta["vocab_size"]
            good &= list(vocab) == sorted(set(vocab))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    if not good:
        raise damaged
    return meta


def open_tokens(folder, split, meta):
    """DIR/train.bin or DIR/val.bin as a read-only array that stays on the disk (numpy.memmap)."""
    path = Path(folder) / f"{split}.bin"
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    expected = meta[f"{split}_tokens"] * dtype.itemsize
    size = path.stat().st_size if path.is_file() else -1
    if size != expected:
        state = "is missing" if size < 0 else f"has {size:,} bytes, meta.json says {expected:,}"
        raise BadInput(f"{path} {state}; delete {folder} and prepare it again")
    return np.memmap(path, dtype, mode="r")


def bits_per_byte(loss, meta):
    """A validation loss in nats a token, as bits a byte: comparable across tokenizers."""
    return loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]


# ------------------------------------------------------------------------------------------------
# Command lines, this one and those of train.py and sample.py


def parse(config_type, arguments, description, default=None):
    """A config_type dataclass from command-line words. What is wrong becomes a one-line BadInput.

    tyro draws its complaint as a box of several lines; here the box goes and the words stay.
    """
    box = StringIO()
    try:
        with redirect_stderr(box):
            extra = {} if default is None else {"default": default}
            return tyro.cli(config_type, args=arguments, description=description, **extra)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    # The first line is a title or a rule; what follows the last rule says where the help is.
    lines = [line.strip(" │|") for line in box.getvalue().splitlines()]
    words = " ".join(";" if set(line) <= set("─-╭╮╰╯+") else line for line in lines[1:])
    words = re.sub(r"\s+", " ", words).replace(" ;", ";").split("; For full helptext")[0]
    raise BadInput(words.strip("; "))


def leave(status):
    """End the program. One of several processes goes at once: gloo may abort the usual end."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(main):
    """Run main() as a program: bad input and what the system refuses are one line and status 2."""
    for stream in (sys.stdout, sys.stderr):  # whatever the terminal's encoding, print on
        stream.reconfigure(errors="replace")
    name = Path(sys.argv[0]).name
    try:
        leave(main() or 0)
    except BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stderr.close()
    except OSError as error:  # no space, no permission: the message names the file
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        leave(130)  # 128 + SIGINT, as shells count
    leave(2)


@dataclass
class PrepareConfig:
    """What the command line takes."""

    corpus: tyro.conf.Positional[Literal[tuple(CORPORA)]]
    path: tyro.conf.Positional[str] = ""  # for "file": a text file, or a folder of .txt files
    tokenizer: Literal["auto", "char", "byte", "gpt2"] = "auto"  # auto: what suits the corpus
    out: str = ""  # folder to write; by default data/<corpus>_<tokenizer>
    source: str = ""  # a local copy instead of the download: .txt, .parquet, .jsonl, or a folder
    max_docs: int = 0  # openwebtext: only the first so many documents; 0: all


def main(arguments=None):
    config = parse(PrepareConfig, arguments, "Turn a text corpus into token numbers.")
    if config.max_docs < 0:
        raise BadInput(f"--max-docs must not be negative, but is {config.max_docs}")
    if config.path and (config.source or config.corpus != "file"):
        raise BadInput(f"{config.path!r} is one word too many; a local copy is --source PATH")
    meta = prepare(
        config.corpus, config.path or config.source, config.tokenizer, config.out, config.max_docs
    )
    folder = config.out or f"data/{config.corpus}_{meta['tokenizer']}"
    print(
        f"{folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
        f" ({meta['tokenizer']}, {meta['vocab_size']:,} different, "
        f"{meta['bytes_per_token']} bytes a token)"
    )


if __name__ == "__main__":
    run(main)
