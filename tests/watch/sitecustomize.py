"""Imported by every Python process that has this folder on PYTHONPATH: it notes what must not happen in the file WATCH.

A line of JSON an event: pickles read and written, sockets to anywhere but this machine (refused, too), and the
environment in which MLflow is imported.
"""

import ipaddress
import json
import os
import pickle
import sys

SETTINGS = ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_DISABLE_TELEMETRY")


def note(kind: str, what: object) -> None:
    frame, callers = sys._getframe(2), []
    while frame and len(callers) < 12:
        callers.append(frame.f_globals.get("__name__", "?"))
        frame = frame.f_back
    line = {"event": kind, "what": repr(what), "process": " ".join(sys.orig_argv), "callers": callers}
    with open(os.environ["WATCH"], "a") as log:  # noqa: PTH123  # pathlib may not be imported yet
        log.write(json.dumps(line) + "\n")


def is_here(address: object) -> bool:
    """Whether an address is one of this machine's own: loopback, or a socket in the file system."""
    if not isinstance(address, tuple):
        return True
    host = address[0] or ""
    try:
        return host in ("", "localhost") or ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        note(event, arguments)
    elif event == "import" and arguments[0] == "mlflow":
        note(event, [os.environ.get(name) for name in SETTINGS])
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not is_here(arguments[1]):
            note(event, arguments[1])
            raise PermissionError(f"{arguments[1]} is not this machine")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if not is_here((host,)):
            note(event, host)
            raise PermissionError(f"{host} is not this machine")


def noted(name: str) -> None:
    """Note every call of a function of pickle; a class of that name is noted when one is made."""
    original = getattr(pickle, name)
    if isinstance(original, type):

        class Noted(original):  # type: ignore[misc,valid-type]
            def __init__(self, *arguments: object, **options: object) -> None:
                note(f"pickle.{name}", "")
                super().__init__(*arguments, **options)

        setattr(pickle, name, Noted)
        return

    def call(*arguments: object, **options: object) -> object:
        note(f"pickle.{name}", "")
        return original(*arguments, **options)

    setattr(pickle, name, call)


sys.addaudithook(hook)
for each in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
    noted(each)
