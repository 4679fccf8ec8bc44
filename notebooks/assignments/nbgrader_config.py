# Read by nbgrader when it is started in this folder: nbgrader generate_assignment 1_delay
c = get_config()  # noqa: F821 (nbgrader defines it)

c.CourseDirectory.course_id = "hsm"
# A test cell gives up by itself (check.py); this ends what loops outside of the tests, in seconds.
# 6 and 7 train for most of a minute in one cell, and for minutes on a machine that is busy.
c.Execute.timeout = 900
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}
c.ClearSolutions.text_stub = "YOUR ANSWER HERE"
# nbgrader zip_collect: whose work is it, and which? The student is what a file's or folder's name
# begins with, up to the first _ :  ada_77_1_delay.ipynb, ada_77/1_delay.ipynb, ada/1_delay.ipynb
c.FileNameCollectorPlugin.named_regexp = (
    r".*[\\/](?![1-7]_[a-z]+[\\/])(?P<student_id>[^\\/_]+)(?:_[^\\/]*?)?[\\/_]"
    r"(?:[1-7]_[a-z]+[\\/])?(?P<file_id>[1-7]_[a-z]+)[^\\/_]*\.ipynb$"
)
