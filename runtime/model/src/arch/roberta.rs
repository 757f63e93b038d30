//! RoBERTa and what shares its architecture: BERT whose positions are counted from the one after padding,
//! with one token type, and a head of its own for classifiers.

use super::encoder_family::{EncoderBlocks, EncoderFamily, FirstPosition, HeadActivation};

pub(super) const ROBERTA: EncoderFamily = EncoderFamily {
    model_type: "roberta",
    classes: "RobertaModel, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaForTokenClassification",
    prefix: "roberta.",
    renames: &[],
    unused: &["pooler.", "lm_head."],
    head_dense: "classifier.dense",
    head_out: "classifier.out_proj",
    head_activation: HeadActivation::Tanh,
    token_types: true,
    first_position: FirstPosition::AfterPadding,
    distances: false,
    blocks: EncoderBlocks::Biased,
};

/// RoBERTa of many languages.
pub(super) const XLM_ROBERTA: EncoderFamily = EncoderFamily {
    model_type: "xlm-roberta",
    classes: "XLMRobertaModel, XLMRobertaForMaskedLM, XLMRobertaForSequenceClassification, \
        XLMRobertaForTokenClassification",
    ..ROBERTA
};

/// RoBERTa of French.
pub(super) const CAMEMBERT: EncoderFamily = EncoderFamily {
    model_type: "camembert",
    classes: "CamembertModel, CamembertForMaskedLM, CamembertForSequenceClassification, \
        CamembertForTokenClassification",
    ..ROBERTA
};
