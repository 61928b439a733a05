"""Weights that Transformers keeps in another form than ``nn.Linear``, as ``nn.Linear``.

Whatever works on linear layers, from the plan over calibration to LoRA, then works on them. A model
is *expanded* before it is quantized and before a quantized checkpoint is loaded, and what has
become plain again is *folded* into its first form.
"""

from squeezellm_hf.integration.expand.model import expand, fold, routers, structure, warn_of_unknown

__all__ = ["expand", "fold", "routers", "structure", "warn_of_unknown"]
