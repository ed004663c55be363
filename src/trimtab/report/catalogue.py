"""`trimtab catalogue`: the registry and the rows, as data and as words."""
from __future__ import annotations

from typing import Any

from trimtab.core.registry import AXES, load_all, near
from trimtab.core.spec import rows
from trimtab.core.types import BadInput
from trimtab.methods.format.panels import TYPES
from trimtab.runtime import names
from trimtab.runtime.native import kernels


def catalogue(name: str | None = None, axis: str | None = None) -> dict[str, Any]:
    """Methods by key and recipes by name, limited to one name or one axis."""
    reg, recipes = load_all(), rows()
    if axis is not None and axis not in (*AXES, "recipe"):
        raise BadInput(f"no axis {axis!r}; axes are {', '.join(AXES)}, recipe")
    methods = {k: {"axis": m.axis, "name": m.name, **m.doc, "needs": list(m.needs) or [d for d in m.data if d == "net"],
                   "knobs": m.knobs, "decides": [m.axis, *m.joint]}
               for k, m in reg.items() if (axis in (None, m.axis)) and (name is None or name in (k, m.name))}
    for m in methods.values():
        if m["axis"] == "format":
            facts = reg[f"format/{m['name']}"].facts
            runs, types = facts["factors"] or m["name"], (*TYPES.values(), *facts["codes"])
            mine = [k for k in kernels() if k["format"] == runs and k["type"] in types]
            m["kernels"] = {k["name"]: k["here"] for k in mine}
    named = {n: {"pipeline": r.text, "source": r.source, "note": r.note, "claims": [c.text for c in r.claims]}
             for n, r in recipes.items() if axis in (None, "recipe") and (name is None or name == n)}
    if name is not None and not methods and not named:
        raise BadInput(f"nothing is called {name!r}{near(name, [m.name for m in reg.values()] + list(recipes))}")
    return {"methods": methods, "recipes": named}


def told(kernels: dict[str, bool]) -> str:
    """In a word, the weights there are kernels for here."""
    kinds: dict[str, dict[str, None]] = {}
    for n in (names.parse(k) for k, here in kernels.items() if here):
        kinds.setdefault(n.format, {})[n.type] = None
    return "; ".join(f"{kind} in {', '.join(types)}" for kind, types in kinds.items()) or "no kernel: it saves bytes, not time"


def print_catalogue(result: dict[str, Any]) -> None:
    one = len(result["methods"]) + len(result["recipes"]) <= 2
    at = ""
    for key, m in result["methods"].items():
        if one:
            print(f"{key}: {m['what']}")
            for section in ("Formula", "Source", "Deviations"):
                print(f"  {section}: {m[section]}")
            print(f"  Needs: {', '.join(m['needs']) or 'the weight only'}   Decides: {', '.join(m['decides'])}")
            print(f"  Knobs: {', '.join(f'{k}={v}' for k, v in m['knobs'].items()) or 'none'}")
            if "kernels" in m:
                here = [name for name, runs in m["kernels"].items() if runs]
                print(f"  Kernels here: {', '.join(here) or 'none: it saves bytes, not time'}")
        else:
            if m["axis"] != at:
                at = m["axis"]
                print(f"\n{at}")
            print(f"  {key.split('/')[1]:<14}{m['what']}")
            if "kernels" in m:
                print(f"  {'':<14}here: {told(m['kernels'])}")
    if result["recipes"] and not one:
        print("\nrecipe")
    for name, r in result["recipes"].items():
        if one:
            print(f"{name} = {r['pipeline']}\n  Source: {r['source']}")
            for c in r["claims"]:
                print(f"  Claim: {c}")
            if r["note"]:
                print(f"  Note: {r['note']}")
        else:
            print(f"  {name:<18}{r['pipeline']}")
