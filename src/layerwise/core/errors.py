"""The one error a user meets: what was given, what is wrong with it, what to do next."""


class UserError(Exception):
    """Something the user can put right.

    The command line prints it as one message and exits with status 2; nothing has been written.

    Args:
        problem: What was given and why it cannot be used; names the file, tensor or layer.
        remedy: What to do next, as an instruction.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy
