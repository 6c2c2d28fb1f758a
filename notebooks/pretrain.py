# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Pre-train with hard examples
#
# Trains HEXA_DCluster on generated shapes, without labels, and looks at what the network learned from: clean, adversarial and
# cut-mixed views, and what one grey level of perturbation does. Runs on a TPU, a GPU or a CPU; on two CPU cores it takes minutes.

# %%
# In Colab: installs the package. Elsewhere it is there already.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("hexa_jax") is None:
    repository = os.environ.get("HEXA_REPOSITORY", "hexa_jax")  # a clone of the repository, or its address
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", repository], check=True)
    sys.path.insert(0, repository)

# %%
import json

import jax
import matplotlib.pyplot as plt
import numpy as np

print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
miniature = bool(os.environ.get("HEXA_MINIATURE"))  # seconds instead of minutes, to see that everything works

# %% [markdown]
# ## Configure
#
# Every setting is in `configs/common.py`. For your own images: `config.data.source = "folder:/content/my_images"`.

# %%
from configs import quickstart, tiny
from hexa_jax.storage.workdir import open_workdir
from hexa_jax.training.loop import pretrain

config = tiny.get_config("scheme=std+adv+cmx,epochs=1") if miniature else quickstart.get_config()
if not miniature:
    config.scheme = "std+adv+cmx"
workdir = open_workdir(os.environ.get("HEXA_WORKDIR", "runs/notebook"), config)

# %% [markdown]
# ## Train
#
# Run the cell again after an interruption: it resumes.

# %%
results = pretrain(config, workdir)
results

# %% [markdown]
# ## Curves

# %%
lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for axis, name in zip(axes, ("loss", "knn_accuracy"), strict=True):
    points = [(line["step"], line[name]) for line in lines if name in line]
    axis.plot(*zip(*points, strict=True), marker=".")
    axis.set(title=name, xlabel="step")
plt.show()

# %% [markdown]
# ## What the network learned from
#
# The views of one batch under the trained network. The perturbation is drawn on a symmetric scale: grey is no change.

# %%
from hexa_jax.report.images import perturbation
from hexa_jax.training.input import TrainingData
from hexa_jax.training.load_run import load_run

run = load_run(workdir)
with jax.set_mesh(run.trainer.mesh):
    data = TrainingData.open(run.config, run.source, run.trainer)
    batch = next(data.batches(0))
    shown = jax.device_get(run.trainer.compile().views(run.state, batch, data.resident))
images = {view: np.clip(crops[0][0, :, 0], 0, 1) for view, crops in shown.images.items()}
delta, radius = perturbation(images["clean"], images["adversarial"])
rows = {"clean": images["clean"], f"±{255 * radius:.0f}/255": delta} | {v: images[v] for v in ("adversarial", "cutmix")}
figure, axes = plt.subplots(len(rows), 8, figsize=(10, 1.35 * len(rows)))
for axis_row, (title, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(axis_row, pictures, strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    axis_row[0].set_ylabel(title)
plt.show()

# %% [markdown]
# ## What the attack changes
#
# Each image's nearest cluster, before and after the attack, both through the adversarial BatchNorm set.

# %%
prototypes = np.asarray(run.state.method.prototypes[0])
before, after = (shown.outputs[name][0, :, 0] @ prototypes.T for name in ("unattacked", "adversarial"))
changed = np.argmax(before, 1) != np.argmax(after, 1)
print(f"the attack moves {100 * changed.mean():.0f} % of {len(changed)} images to another cluster")
own = (
    np.take_along_axis(before, np.argmax(before, 1)[:, None], 1),
    np.take_along_axis(after, np.argmax(before, 1)[:, None], 1),
)
plt.figure(figsize=(5, 3))
plt.hist(own[0][:, 0], 20, alpha=0.6, label="clean")
plt.hist(own[1][:, 0], 20, alpha=0.6, label="attacked")
plt.xlabel("cosine with the cluster of the clean view")
plt.legend()
plt.show()
