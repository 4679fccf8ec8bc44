# Read by nbgrader when it is started in this folder: nbgrader generate_assignment 1_delay
c = get_config()  # noqa: F821 (nbgrader defines it)

c.CourseDirectory.course_id = "hsm"
# A test cell gives up by itself (check.py); this ends what loops outside of the tests, in seconds.
c.Execute.timeout = 300
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}
c.ClearSolutions.text_stub = "YOUR ANSWER HERE"
