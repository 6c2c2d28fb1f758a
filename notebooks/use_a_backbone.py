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
# # Use a pre-trained backbone
#
# Load weights (a workdir of a run, a `.safetensors` file, or with torch a `.pth` file in torchvision's, MoCo's or SwAV's layout),
# compute features of a folder of images, find similar images, and fit a classifier to a few labels.

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
import jax
import matplotlib.pyplot as plt
import numpy as np

print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
# workdir or file; Jupyter may have been started in the folder of the notebooks
quickstart = "runs/quickstart" if os.path.exists("runs/quickstart") else "../runs/quickstart"
checkpoint = os.environ.get("HEXA_CHECKPOINT", quickstart)
folder = os.environ.get("HEXA_IMAGES", "")  # of your images; empty: generated shapes
side = int(os.environ.get("HEXA_SIDE", "64"))  # pixels: 224 for networks trained on ImageNet-sized crops

# %% [markdown]
# ## Load
#
# `apply(variables, images)` maps uint8 images [N, H, W, 3] to pooled features [N, F].

# %%
import hexa_jax

apply, variables = hexa_jax.load(checkpoint)
features_of = jax.jit(apply)

# %% [markdown]
# ## Features of a folder

# %%
from hexa_jax.data.sources import make_source
from hexa_jax.evals.features import EvalImages, extract
from hexa_jax.evals.knn import nearest

source = make_source(f"folder:{folder}" if folder else "shapes:test", image_size=side, num_examples=300)
images = EvalImages(source, np.arange(len(source)), side, side)
features = extract(lambda batch: features_of(variables, batch), images, 64)
features.shape

# %% [markdown]
# ## Search
#
# Each row: an image and the images whose features are most similar.

# %%
queries = np.arange(0, len(source), max(len(source) // 5, 1))[:5]
similarity, found = nearest(features, features[queries], 6, own=queries)
figure, axes = plt.subplots(len(queries), 7, figsize=(9, 1.4 * len(queries)))
for axis_row, query, scores, rows in zip(axes, queries, similarity, found, strict=True):
    for axis, row, title in zip(
        axis_row, [query, *rows], ["query", *[f"{score:.2f}" for score in scores]], strict=True
    ):
        axis.imshow(images.image(row))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Probe
#
# A linear classifier on frozen features, where there are labels. Half of the images train it, the other half judge it.

# %%
from hexa_jax.evals.knn import accuracy
from hexa_jax.evals.linear import linear_probe

if source.num_classes is not None:
    order = np.random.default_rng(0).permutation(len(source))
    train, test = np.array_split(order, 2)
    labels = images.labels
    predicted = linear_probe(features[train], labels[train], features[test])
    print(
        f"linear probe: {accuracy(predicted, labels[test]):.1f} % of {len(test)} images, {source.num_classes} classes"
    )
