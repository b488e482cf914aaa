"""Layers trained one after the other, coarse to fine: each on photos of its own resolution, on top of all those before.

A layer's rows are [foundation | new]. What it leaves is its new rows, and the opacities that it has found for the rows below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from s2d.completion import starting_points
from s2d.device import to_cpu
from s2d.files import atomic_torch_save
from s2d.gaussians import Gaussians, concatenate, gaussians_from_points, thin_points
from s2d.layers.density import remove_rows
from s2d.layers.foundation import Foundation
from s2d.layers.loop import LayerLoop
from s2d.layers.options import LayerPlan
from s2d.layers.rows import INVISIBLE, pick_rows
from s2d.layers.score import view_psnr
from s2d.layers.task import LayerTask, TrainedLayers
from s2d.log import logger, progress
from s2d.rasterize import cpus_for_kernels
from s2d.refinement import Refinement
from s2d.sampling import ViewSampler
from s2d.saved_runs import load_run, save_run
from s2d.training import (
    TrainingRun,
    read_losses,
    record,
    start_run,
    use_strategies,
)

INIT_OPACITY = 0.1


def train_layers(
    task: LayerTask,
    plan: Sequence[LayerPlan],
    done: TrainedLayers,
    scratch: Path,
    first_step: int = 0,
    refinement: Refinement | None = None,
) -> tuple[TrainedLayers, TrainingRun]:
    """Train the layers of `plan` on top of those that are `done`.

    Args:
        task, plan: What, and how each.
        done: Layers to build on, perhaps none; not changed.
        scratch: Folder for what an interrupted call needs to go on; it ends with the same bits.
        first_step: Number of the first step, for the history.
        refinement: Cameras that are learned, carried from layer to layer.

    Returns:
        All layers, and the run of the last one.
    """
    layers = TrainedLayers([*done.parts], [*done.opacities], [*done.rescales], [*done.metrics])
    carried: dict[str, Any] = {"history": None, "seconds": 0.0}
    for number, layer in enumerate(plan):
        finished = scratch / f"layer_{number}.pth"
        if finished.exists():
            saved = torch.load(finished, weights_only=True)
            part, below, metrics, carried = (
                Gaussians(**saved["part"]),
                saved["below"],
                saved["metrics"],
                saved["carried"],
            )
            if saved["refinement"] is not None:
                refinement = Refinement.from_state(
                    saved["refinement"], task.refinement_rates, True, task.device
                )
        else:
            logger.info(
                "layer %d of %d: photos at 1/%g, %d Gaussians below, at most %d new",
                *(
                    number + 1,
                    len(plan),
                    layer.factor,
                    sum(p.num for p in layers.parts),
                    layer.budget,
                ),
            )
            run = _train_layer(
                *(task, layer, number, layers, scratch, first_step, refinement, carried),
                all_degrees=bool(done.parts),
            )
            num_below = sum(part.num for part in layers.parts)
            drawn = run.gaussians.detached()
            if run.backdrop is not None:
                drawn = concatenate([drawn, run.backdrop])
            kept = drawn.to("cpu")
            part = pick_rows(kept, slice(num_below, None))
            free = num_below > 0 and task.flags.freeze == "opacity"
            below = kept.opacity_logits[:num_below].clone() if free else None
            metrics = {
                "steps": layer.steps,
                "psnr_kept": round(
                    view_psnr(drawn, run.refinement, task.kept, task.views, layer.factor),
                    3,
                ),
            }
            refinement = run.refinement
            carried = {"history": run.history, "seconds": run.seconds}
            if number + 1 < len(plan):  # the last one's run is what the caller goes on with
                state = {
                    "part": part.tensors(),
                    "below": below,
                    "metrics": metrics,
                    "carried": carried,
                    "refinement": None if refinement is None else refinement.state_dict(),
                }
                atomic_torch_save(finished, to_cpu(state))
                (scratch / f"run_{number}.pth").unlink(missing_ok=True)
        layers.parts.append(part)
        layers.opacities.append(below)
        layers.rescales.append(1 / layer.factor)
        layers.metrics.append(metrics)
        first_step += layer.steps
    return layers, run


def new_rows(task: LayerTask, layer: LayerPlan, number: int, is_first: bool) -> Gaussians:
    """Make the Gaussians that a layer starts with: those of an initialiser, or points of stage 0, none for a later layer without points."""
    if task.initial:
        rows = task.initial[number]
        return pick_rows(rows, thin_points(rows.means, layer.budget, rows.opacity_logits))
    share = task.flags.layer_points or (0.5 if is_first else 0.0)
    most = max(4, int(share * layer.budget))
    points, rgbs, _ = starting_points(task.points, task.guessed, most, task.flags.layer_fill)
    made = gaussians_from_points(points, rgbs, task.flags.layer_sh_degree, INIT_OPACITY)
    return made if share > 0 else pick_rows(made, slice(0, 0))


def _train_layer(
    task: LayerTask,
    layer: LayerPlan,
    number: int,
    layers: TrainedLayers,
    scratch: Path,
    first_step: int,
    refinement: Refinement | None,
    carried: dict[str, Any],
    all_degrees: bool,
) -> TrainingRun:
    """Train one layer; the run's rows are [foundation | new]."""
    below = layers.gaussians
    num_below = 0 if below is None else below.num
    names = task.kept.names
    sampler = ViewSampler(
        names, task.novel, task.alpha if task.novel else 1.0, task.sample_drop, task.seed + number
    )
    checkpoint = scratch / f"run_{number}.pth"
    if checkpoint.exists():
        run = load_run(checkpoint, task.rates, sampler, task.refinement_rates, task.device)
    else:
        new = new_rows(task, layer, number, below is None)
        rows = (new if below is None else concatenate([below, new])).to(task.device)
        run = start_run(
            *(rows, task.rates, task.scene_extent, sampler, task.seed + number, first_step),
            refinement=refinement,
        )
        if carried["history"] is not None:
            run.history = carried["history"]
        run.seconds_before = carried["seconds"]
    last = first_step + layer.steps
    if task.photos is not None:
        use_strategies(
            *(run, task.strategy, task.photos, task.points.points, task.depth, last),
            seed=task.seed + number,
            novel=task.novel_cameras,
        )
    foundation = Foundation.of(run.gaussians, num_below, task.flags.freeze)
    loop = LayerLoop(task, layer, run, foundation, first_step)
    with cpus_for_kernels(), progress(last, f"layer 1/{layer.factor:g}", start=run.step) as bar:
        while run.step < last:
            loss = loop.step(all_degrees)
            record(run, loss)
            if run.step % task.checkpoint_every == 0 and run.step < last:
                save_run(run, checkpoint)
            bar.update(run.step, loss=loss, gaussians=run.gaussians.num)
    read_losses(run)
    loop.clear()
    # Nothing can bring back what is never drawn: it would be stored and sent for nothing.
    remove_rows(run, torch.sigmoid(run.gaussians.opacity_logits.detach()) < INVISIBLE, foundation)
    foundation.check(run.gaussians, "the end of the layer")
    return run
