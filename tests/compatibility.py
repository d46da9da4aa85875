"""The table of docs/compatibility.md, from what the tests of the families run.

    python tests/compatibility.py            run every family on the installed transformers, write its facts, and the page
    python tests/compatibility.py llava      some families, into the facts that are there, and the page
    python tests/compatibility.py --page     the page alone, from the facts of all releases that have run

Facts are in docs/compatibility/transformers-<release>.json, one file a release. `make compatibility` runs all three releases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
FACTS = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
#: logits of packed documents and of each alone
CLOSE = 1e-5

HEAD = """# Compatibility

What `vlm_fuse.integrations.transformers.patch` does to models of {count} families: tiny random models, on a CPU with torch {torch}. Made by
`make compatibility` from the tests `tests/test_patched_families.py` and `tests/test_packed_families.py`; nothing of it has run on a GPU.

- **patched**: loss, logits and every gradient equal to the bit in all of the family's batches (their number; padded left and right,
  several images, a row or a batch without any, videos, embeddings in place of ids, features computed before), float32, training;
  bfloat16, evaluation, gradient checkpointing and `generate` too. In brackets `masked_scatter` and host reads
  (`nonzero`, `_local_scalar_dense`) of a step with several images, before and after.
- **packed**: documents in one row, `position_ids` that begin anew, with and without an attention_mask of ones and a cache: each within 1e-5 of
  the logits of the document alone. "itself": the model isolates them without the patch too, where neither mask nor cache is given.
  flash_attention_2 needs a GPU and has not run.
- **graphs** of `torch.compile` for a step, before and after; "-": not counted.

{notes}
"""

NOTES = """The other families of transformers that merge with `masked_scatter`, some fifty, are rewritten by the same rule; no tiny model was made of
them (audio models, those that need timm). GLM-Image merges ids in place of embeddings and keeps its `masked_scatter` for that. What
cannot be rewritten is listed by a warning. M-RoPE's positions are left to the model in Qwen2.5-Omni, Qwen3-Omni, GLM-Image, HunYuan-VL
and MiniCPM-V 4.7. A step under bfloat16 convolutions of GOT-OCR2 is another one each time, patched or not.
In 4.57 GLM-4V takes M-RoPE's positions without the text's row, and unpatched only beside an attention_mask."""


def facts(only: list[str]) -> dict:
    """Every family on the installed release, or only some."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parent))
    from tqdm import tqdm

    from families.registry import FAMILIES
    from packed_documents import ISOLATED, LEAKING
    from test_patched_families import ALWAYS, COUNTED, compare_all, ready
    from transformers_release import RELEASE

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name, family in tqdm(FAMILIES.items(), file=sys.stderr):
        if not family.installed or (only and name not in only):
            continue
        row = {"model": family.model, "merge": family.merge}
        try:
            model = ready(name)
        except BaseException as error:  # pytest's Skipped: another release does not run it
            found[name] = row | {"left_out": str(error)[:120]}
            continue
        done = compare_all(name)
        several = done["several_images"]
        row["batches"] = len(done)
        row["scatters"] = [several[when]["masked_scatter"] for when in ("before", "after")]
        row["reads"] = [sum(several[when][counted] for counted in COUNTED[2:]) for when in ("before", "after")]
        if name in (*ISOLATED, *LEAKING):
            # before 5.0 flex_attention's kernels abort the process on a CPU, and Dynamo fails on some unpatched models
            row["packed"] = {implementation: _packed(name, implementation) for implementation in (IMPLEMENTATIONS if RELEASE >= (5, 0) else IMPLEMENTATIONS[:2])}
        if name in ALWAYS and RELEASE >= (5, 0):
            with contextlib.suppress(torch._dynamo.exc.TorchDynamoException, RuntimeError, AssertionError):  # what Dynamo cannot trace unpatched either
                row["graphs"] = _graphs(model, family)
        found[name] = row
    return {"transformers": transformers.__version__, "torch": torch.__version__, "families": found}


def _packed(name: str, implementation: str) -> str:
    import torch

    from families.registry import FAMILIES
    from packed_documents import Documents
    from vlm_fuse.integrations.transformers import patched

    torch._dynamo.reset()  # flex_attention compiles: sizes that other families had would be made symbols, which Inductor fails on at times
    try:
        model = FAMILIES[name].build()
        model.train(name in ("paligemma", "molmo2"))
        made = Documents(model, FAMILIES[name])
        with torch.no_grad():
            expected = torch.cat([model(**alone).logits[0] for alone in made.alone])
            model.set_attn_implementation(implementation)
            for module in model.modules():  # towers need no mask, and flex_attention takes seconds for each of theirs
                if "ision" in type(getattr(module, "config", None)).__name__:
                    module.config._attn_implementation = "sdpa"
            itself = _isolates(model, made, expected)
            ones = torch.ones_like(made.packed["input_ids"])
            with patched(model):
                off = max(float((model(**(made.packed | more)).logits[0] - expected).abs().max()) for more in ({}, {"attention_mask": ones}, {"use_cache": True}))
    except Exception as error:
        return "unsupported" if "does not support" in str(error) else f"{type(error).__name__}"
    return ("isolated, itself" if itself else "isolated") if off < CLOSE else f"off by {off:.1g}"


def _isolates(model, made, expected) -> bool:
    """Unpatched."""
    if made.only_three:  # it takes a packed row beside a mask alone
        return False
    return bool((model(**made.packed).logits[0] - expected).abs().max() < 1e-4)


def _graphs(model, family) -> list[int]:
    import torch

    from families.batches import batch
    from vlm_fuse.integrations.transformers import patched

    inputs = batch(model, family, "several_images")
    model(**inputs)

    def count() -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(model)(**inputs).graph_count

    before = count()
    with patched(model):
        return [before, count()]


def page(releases: list[dict]) -> str:
    """The page, from the facts of each release, the newest first."""
    shown = max((facts_["families"] for facts_ in releases), key=lambda families: sum("left_out" not in row for row in families.values()))
    lines = [HEAD.format(count=len(shown), torch=releases[0]["torch"].split("+")[0], notes=NOTES)]
    for facts_ in releases:
        lines += [f"## transformers {facts_['transformers']}", ""]
        lines += ["| family | model | patched | packed: " + " | ".join(IMPLEMENTATIONS) + " | graphs |", "| --- " * (4 + len(IMPLEMENTATIONS)) + "|"]
        left_out = []
        for name, row in sorted(facts_["families"].items()):
            if "left_out" in row:
                left_out.append(name)
                continue
            counts = "; ".join(f"{label} {before} to {after}" for label, (before, after) in (("scatters", row["scatters"]), ("reads", row["reads"])))
            packed = [row.get("packed", {}).get(implementation, "-") for implementation in IMPLEMENTATIONS]
            graphs = "{} to {}".format(*row["graphs"]) if "graphs" in row else "-"
            lines.append(f"| {name} | {row['model']} | {row['batches']} batches ({counts}) | {' | '.join(packed)} | {graphs} |")
        if left_out:
            lines += ["", f"Written for 5.23 and not run on this release: {', '.join(left_out)}."]
        lines.append("")
    lines += ["Patching takes two lines:", "", "```python", "from vlm_fuse.integrations.transformers import patch", "", "assert patch.__doc__", "```", ""]
    return "\n".join(lines)


def releases() -> list[dict]:
    """The facts that there are, the newest release first."""
    made = [json.loads(path.read_text()) for path in FACTS.glob("transformers-*.json")]
    return sorted(made, key=lambda facts_: tuple(int(part) for part in facts_["transformers"].split(".")), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/compatibility.py", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    arguments = parser.parse_args()
    if not arguments.page:
        made = facts(arguments.families)
        FACTS.mkdir(exist_ok=True)
        release = ".".join(made["transformers"].split(".")[:2])
        path = FACTS / f"transformers-{release}.json"
        if arguments.families:
            made["families"] = json.loads(path.read_text())["families"] | made["families"]
        path.write_text(json.dumps(made, indent=1) + "\n")
    PAGE.write_text(page(releases()))


if __name__ == "__main__":
    main()
