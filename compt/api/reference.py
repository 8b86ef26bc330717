"""Write docs/api.md from the docstrings and the examples: python -m compt.api.reference docs/api.md."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import compt
from compt.files import write_text
from compt.recipe.schema import Recipe

HEAD = """# The Python API

<!-- Made by `python -m compt.api.reference docs/api.md` from the docstrings of compt/api and from docs/examples. -->

These names stay from release to release; everything else in the package may move. `import compt` takes milliseconds:
torch loads when the first function needs it.
"""
EXAMPLES = {
    "whole_path.py": "Plan, train, expand and evaluate, on the emoji sample",
    "own_loop.py": "Inverse weight initialization and feature distillation in your own loop",
}
_RECIPE = "The settings of a run, checked: `Recipe.model_validate(values)`. Fields: [recipes.md](recipes.md)."


def _entry(name: str, thing: Any) -> str:
    """The section of one name: its call as in the source, then its docstring, and those of a class's methods."""
    parts = [f"### {name}"]
    if thing is Recipe:
        parts.append(_RECIPE)
    elif inspect.isclass(thing):
        [found] = ast.parse(inspect.getsource(thing)).body
        assert isinstance(found, ast.ClassDef)
        methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
        if "__init__" in methods:
            parts.append(_call(methods.pop("__init__"), f"compt.{name}"))
        parts.append(ast.get_docstring(found) or "")
        for method, node in methods.items():
            parts += [_call(node, f"{name}.{method}"), ast.get_docstring(node) or ""]
    else:
        [function] = ast.parse(inspect.getsource(thing)).body
        assert isinstance(function, ast.FunctionDef)
        parts += [_call(function, f"compt.{name}"), ast.get_docstring(function) or ""]
    return "\n\n".join(parts)


def _call(node: ast.FunctionDef, name: str) -> str:
    """The signature, with an argument a line where it is long."""
    node.args.args = [one for one in node.args.args if one.arg != "self"]
    arguments, result = ast.unparse(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    result = "" if node.name == "__init__" else result
    if len(name) + len(arguments) + len(result) > 100:
        # A comma within brackets belongs to a type.
        lines = re.split(r", (?![^\[]*\])", arguments)
        arguments = "".join(["\n", *(f"    {line},\n" for line in lines)])
    return f"```python\n{name}({arguments}){result}\n```"


def reference(examples: Path) -> str:
    """The page."""
    parts = [HEAD.strip(), "## Examples"]
    for file, title in EXAMPLES.items():
        code = (examples / file).read_text(encoding="utf-8").strip()
        parts.append(f"{title} ([{file}](examples/{file})):\n\n```python\n{code}\n```")
    parts.append("## Names")
    parts += [_entry(name, getattr(compt, name)) for name in compt.__all__]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), reference(Path(sys.argv[1]).parent / "examples"))
