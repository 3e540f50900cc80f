"""Triton's interpreter without work that it does again and again, a third of the time that interpreted kernels take."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

TRITONS_OWN = vars(interpreter.InterpretedFunction).get("__call__")


def _call(function: Any, *arguments: Any, **more: Any) -> Any:
    """Call a function inside a kernel. The launch around it has replaced the operations of the language by interpreted
    ones; Triton looks through all of them once more."""
    languages = [module for module in function.fn.__globals__.values() if module is tl or module is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*arguments, **more)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def hasten() -> None:
    """For all kernels of this process."""
    assert TRITONS_OWN is not None, "Triton's interpreter calls functions in another way"
    interpreter.InterpretedFunction.__call__ = _call
