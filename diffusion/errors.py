"""The errors that a user can act on."""


class UserError(Exception):
    """Something a user can mend: bad parameters, data or files.

    The message is one line: the file, field or value at fault, and what to do. The command line prints
    it without a traceback and exits with status 1; any other exception is a defect and keeps its traceback.
    """
