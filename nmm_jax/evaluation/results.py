"""The numbers of one evaluation: kept as JSON in the run's folder, shown as a table on the terminal."""

import json
import os
from typing import Any

from etils import epath

from data_pipelines import paths

Results = dict[str, Any]  # docs/evaluation.md lists the keys


def table(results: Results) -> str:
    """What the terminal shows."""
    lines = [f"step {results['step']}"]
    if "held_out" in results:
        lines += ["", f"{'held-out loss (nats a token)':30}{'loss':>15}{'shuffled images':>18}{'drop':>14}{'rows':>7}"]
        for source, loss in results["held_out"].items():
            shuffled, drop = results["shuffled_images"].get(source), results["image_gain"].get(source)
            lines.append(
                f"  {source:28}{_pm(loss['loss'], loss['standard_error'], 4):>15}"
                + (f"{_pm(shuffled['loss'], shuffled['standard_error'], 4):>18}" if shuffled else f"{'-':>18}")
                + (f"{_pm(drop['drop'], drop['standard_error'], 1, 100) + '%':>14}" if drop else f"{'-':>14}")
                + f"{loss['rows']:>7}"
            )
    if "questions" in results:
        lines += [
            "",
            f"{'questions (% right)':30}{'accuracy':>15}{'base':>8}{'gain':>8}{'seen':>8}{'held out':>10}{'n':>7}",
        ]
        for kind, score in results["questions"].items():
            inner = [score.get(part) for part in ("seen", "held_out_combinations")]
            seen, unseen = (f"{100 * part['accuracy']:.1f}" if part else "" for part in inner)
            accuracy = _pm(score["accuracy"], score["standard_error"], 1, 100)
            lines.append(
                f"  {kind:28}{accuracy:>15}{100 * score['base']:>8.1f}{100 * score['gain']:>+8.1f}"
                f"{seen:>8}{unseen:>10}{score['count']:>7}"
            )
    if "in_context" in results:
        lines += [
            "",
            f"{'captions in context (nats)':30}{'alone':>15}{'gain of a pair':>18}{'of its text':>15}"
            f"{'with other image':>18}{'n':>7}",
        ]
        for source, arms in results["in_context"].items():
            pair, text, other = (
                _pm(arms[arm]["gain"], arms[arm]["gain_error"], 4) for arm in ("pair", "text", "other_image")
            )
            alone = _pm(arms["alone"]["loss"], arms["alone"]["standard_error"], 4)
            lines.append(f"  {source:28}{alone:>15}{pair:>18}{text:>15}{other:>18}{arms['captions']:>7}")
    if "retrieval" in results:
        ranks = list(next(iter(results["retrieval"].values()))["image_to_text"])  # recall@1, recall@5, ...
        lines += ["", f"{'retrieval (%, chance)':40}" + "".join(f"{rank:>21}" for rank in ranks) + f"{'pairs':>7}"]
        for source, found in results["retrieval"].items():
            for direction in ("image_to_text", "text_to_image"):
                cells = [_recall(found[direction][rank]) for rank in ranks]
                name = f"{source}, {direction.replace('_', ' ')}"
                lines.append(f"  {name:38}" + "".join(f"{cell:>21}" for cell in cells) + f"{found['pairs']:>7}")
    if "pixels" in results:
        given = list(next(iter(results["pixels"].values()))["by_prefix"])
        lines += ["", f"{'next patches (mean square)':30}{'loss':>15}{'of zero':>10}{'explained':>14}"]
        lines[-1] += "".join(f"{f'behind {prefix}':>17}" for prefix in given) + f"{'rows':>7}"
        for source, found in results["pixels"].items():
            loss = _pm(found["loss"], found["standard_error"], 4)
            explained = _pm(found["explained"]["value"], found["explained"]["standard_error"], 1, 100) + "%"
            lines.append(
                f"  {source:28}{loss:>15}{found['zero']:>10.4f}{explained:>14}"
                + "".join(f"{_pm(x['value'], x['standard_error'], 4):>17}" for x in found["by_prefix"].values())
                + f"{found['rows']:>7}"
            )
    return "\n".join(lines + [f"\nnote: {note}" for note in results["notes"]])


def _recall(found: dict[str, Any]) -> str:
    return f"{_pm(found['value'], found['standard_error'], 1, 100)} ({100 * found['chance']:.1f})"


def _pm(value: float, error: float | None, digits: int, scale: float = 1) -> str:
    return f"{scale * value:.{digits}f}" + ("" if error is None else f" ±{scale * error:.{digits}f}")


def path_of(workdir: str, step: int) -> epath.Path:
    """Where the evaluation of a step is kept."""
    return epath.Path(workdir) / "evaluation" / f"{step}.json"


def save(results: Results, workdir: str) -> epath.Path:
    """Keeps the results in the run's folder, beside what other tasks measured of the same step before."""
    path = path_of(workdir, results["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write((read(workdir, results["step"]) or {}) | results, path)
    return path


def write(results: Results, path: str | os.PathLike) -> None:
    """Writes the file as a whole or not at all."""
    paths.write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def read(workdir: str, step: int) -> Results | None:
    """What was measured of a step; None if nothing was yet."""
    path = path_of(workdir, step)
    return json.loads(path.read_text()) if path.exists() else None
