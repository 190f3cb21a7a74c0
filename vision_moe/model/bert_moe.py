"""BERT, RoBERTa and XLM-RoBERTa with mixtures, text towers of a `VisionTextDualEncoderMoEModel`.

Padding is neither routed nor counted, as far as `attention_mask` tells of it.
"""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

from vision_moe.model.configuration import MoEFields
from vision_moe.model.tower import MoEBlock, MoETower


@strict
class BertMoEConfig(MoEFields, BertConfig):
    """See `MoEFields` and `transformers.BertConfig`."""

    model_type = "bert_moe"


class BertMoELayer(MoEBlock, BertLayer):
    """A block."""


class BertMoEModel(MoETower, BertModel):
    """The tower."""

    config: BertMoEConfig
    block_class = BertMoELayer


@strict
class RobertaMoEConfig(MoEFields, RobertaConfig):
    """See `MoEFields` and `transformers.RobertaConfig`."""

    model_type = "roberta_moe"


class RobertaMoELayer(MoEBlock, RobertaLayer):
    """A block."""


class RobertaMoEModel(MoETower, RobertaModel):
    """The tower."""

    config: RobertaMoEConfig
    block_class = RobertaMoELayer


@strict
class XLMRobertaMoEConfig(MoEFields, XLMRobertaConfig):
    """See `MoEFields` and `transformers.XLMRobertaConfig`."""

    model_type = "xlm_roberta_moe"


class XLMRobertaMoELayer(MoEBlock, XLMRobertaLayer):
    """A block."""


class XLMRobertaMoEModel(MoETower, XLMRobertaModel):
    """The tower."""

    config: XLMRobertaMoEConfig
    block_class = XLMRobertaMoELayer
