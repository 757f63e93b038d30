//! RoBERTa and what shares its architecture: BERT whose positions are counted from the one after padding,
//! with one token type, and a head of its own for classifiers.

use super::encoder_family::{EncoderFamily, HeadActivation};

pub(super) const ROBERTA: EncoderFamily = EncoderFamily {
    model_type: "roberta",
    classes: "RobertaModel, RobertaForMaskedLM, RobertaForSequenceClassification",
    prefix: "roberta.",
    renames: &[],
    unused: &["pooler.", "lm_head."],
    head_dense: "classifier.dense",
    head_out: "classifier.out_proj",
    head_activation: HeadActivation::Tanh,
    token_types: true,
    positions_after_padding: true,
};

/// RoBERTa of many languages.
pub(super) const XLM_ROBERTA: EncoderFamily = EncoderFamily {
    model_type: "xlm-roberta",
    classes: "XLMRobertaModel, XLMRobertaForMaskedLM, XLMRobertaForSequenceClassification",
    ..ROBERTA
};

/// RoBERTa of French.
pub(super) const CAMEMBERT: EncoderFamily = EncoderFamily {
    model_type: "camembert",
    classes: "CamembertModel, CamembertForMaskedLM, CamembertForSequenceClassification",
    ..ROBERTA
};
