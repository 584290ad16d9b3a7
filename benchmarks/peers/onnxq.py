"""onnxq: recipes; clean, alone and with fold-batch-norm."""

from onnxq import PassManager, load
from onnxq import quantize as by_recipe
from onnxq.passes import Clean, FoldBatchNorm

DISTRIBUTIONS = ("onnxq",)


def quantize(model, feeds, output, **settings):
    by_recipe(model, output, feeds, **settings)


def simplify(model, feeds, output, *, fold):
    simple, _ = PassManager(Clean(), *([FoldBatchNorm()] if fold else []))(load(model))
    simple.save(output)
