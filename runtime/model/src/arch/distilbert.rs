//! DistilBERT: BERT without token types, under other names.

use super::encoder_family::{EncoderBlocks, EncoderFamily, FirstPosition, HeadActivation, rename};

pub(super) const DISTILBERT: EncoderFamily = EncoderFamily {
    model_type: "distilbert",
    classes: "DistilBertModel, DistilBertForMaskedLM, DistilBertForSequenceClassification, \
        DistilBertForTokenClassification",
    prefix: "distilbert.",
    renames: &[
        rename("transformer.layer.", "encoder.layer."),
        rename("attention.q_lin.", "attention.self.query."),
        rename("attention.k_lin.", "attention.self.key."),
        rename("attention.v_lin.", "attention.self.value."),
        rename("attention.out_lin.", "attention.output.dense."),
        rename("sa_layer_norm.", "attention.output.LayerNorm."),
        rename("ffn.lin1.", "intermediate.dense."),
        rename("ffn.lin2.", "output.dense."),
        rename("output_layer_norm.", "output.LayerNorm."),
    ],
    unused: &["vocab_transform.", "vocab_layer_norm.", "vocab_projector."],
    head_dense: "pre_classifier",
    head_out: "classifier",
    head_activation: HeadActivation::Relu,
    token_types: false,
    first_position: FirstPosition::Zero,
    distances: false,
    blocks: EncoderBlocks::Biased,
};
