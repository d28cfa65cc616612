"""How an option is written on the command line."""


def flag(name):
    return "--" + name.replace("_", "-")
