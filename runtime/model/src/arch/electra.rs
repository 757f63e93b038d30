//! ELECTRA: BERT whose embeddings may be narrower than its blocks, with a head of its own for classifiers.

use super::encoder_family::{EncoderBlocks, EncoderFamily, FirstPosition, HeadActivation};

pub(super) const ELECTRA: EncoderFamily = EncoderFamily {
    model_type: "electra",
    classes: "ElectraModel, ElectraForMaskedLM, ElectraForPreTraining, ElectraForSequenceClassification, \
        ElectraForTokenClassification",
    prefix: "electra.",
    renames: &[],
    unused: &["discriminator_predictions.", "generator_predictions.", "generator_lm_head."],
    head_dense: "classifier.dense",
    head_out: "classifier.out_proj",
    head_activation: HeadActivation::Gelu,
    token_types: true,
    first_position: FirstPosition::Zero,
    distances: false,
    blocks: EncoderBlocks::Biased,
};
