//! What the families of encoders differ in beside their sizes: the names of classes and tensors, how
//! positions are counted, and the head of their classifiers. All of them compute what `bert.rs` lowers.

use super::{distilbert, electra, modernbert, mpnet, nomic, roberta};

/// The end of the name of a class with a head that gives a logit for each label.
const CLASSIFIER: &str = "ForSequenceClassification";
/// The end of the name of a class that gives each token a logit for each label.
const TOKEN_CLASSIFIER: &str = "ForTokenClassification";

/// The projection of every row to labels, in classes whose tokens have labels: the same name in all families.
pub(super) const TOKEN_HEAD: &str = "classifier";

/// The activation between the two projections of a classifier's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadActivation {
    Tanh,
    Relu,
    Gelu,
    /// There is one projection.
    None,
}

/// The row of the table of positions that the first token of a text has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FirstPosition {
    /// The first one.
    Zero,
    /// The one after the row of the id of padding.
    AfterPadding,
    /// This one, whatever the id of padding is.
    Fixed(usize),
}

/// What the blocks of a family compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EncoderBlocks {
    /// Projections have biases, the feed-forward part is a GELU, and positions have a table.
    Biased,
    /// Queries and keys are rotated and there is no table, projections have no biases, and the feed-forward
    /// part is a SiLU times a second projection.
    Rotary,
}

/// A part of a tensor's name and what it is called in BERT.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rename {
    from: &'static str,
    to: &'static str,
}

pub(super) const fn rename(from: &'static str, to: &'static str) -> Rename {
    Rename { from, to }
}

/// A family of encoders.
#[derive(Debug)]
pub(crate) struct EncoderFamily {
    /// The word in `model_type` of `config.json`.
    pub(crate) model_type: &'static str,
    /// The classes that can be served, as a list for messages. What else those without
    /// `ForSequenceClassification` have (a pooler, a head that guesses words) gives no embedding.
    pub(crate) classes: &'static str,
    /// The prefix of tensor names where the encoder is a part of a larger class.
    pub(super) prefix: &'static str,
    /// Names of tensors that BERT spells otherwise, in the order in which they are replaced.
    pub(super) renames: &'static [Rename],
    /// Beginnings of the names of tensors that no answer depends on.
    pub(super) unused: &'static [&'static str],
    /// The first projection of a classifier's head, from the first row of a text.
    pub(super) head_dense: &'static str,
    /// The second one, to the labels.
    pub(super) head_out: &'static str,
    pub(crate) head_activation: HeadActivation,
    /// Whether rows have the embedding of a token type.
    pub(crate) token_types: bool,
    pub(crate) first_position: FirstPosition,
    /// Whether scores get a learned value for each head and bucket of distances (`mpnet.rs`).
    pub(crate) distances: bool,
    pub(crate) blocks: EncoderBlocks,
}

/// BERT itself. Its pooler is the first projection of a classifier's head.
pub(crate) const BERT: EncoderFamily = EncoderFamily {
    model_type: "bert",
    classes: "BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, \
        BertForTokenClassification",
    prefix: "bert.",
    renames: &[],
    unused: &["pooler.", "cls."],
    head_dense: "pooler.dense",
    head_out: "classifier",
    head_activation: HeadActivation::Tanh,
    token_types: true,
    first_position: FirstPosition::Zero,
    distances: false,
    blocks: EncoderBlocks::Biased,
};

/// Every family of encoders.
const FAMILIES: &[&EncoderFamily] = &[
    &BERT,
    &roberta::ROBERTA,
    &roberta::XLM_ROBERTA,
    &roberta::CAMEMBERT,
    &distilbert::DISTILBERT,
    &electra::ELECTRA,
    &mpnet::MPNET,
    &nomic::NOMIC,
];

/// The family of that `model_type`.
pub(crate) fn of_model_type(model_type: &str) -> Option<&'static EncoderFamily> {
    FAMILIES.iter().copied().find(|family| family.model_type == model_type)
}

/// The words of all families and of ModernBERT, for messages.
pub(crate) fn supported() -> String {
    let words = FAMILIES.iter().map(|family| family.model_type).chain([modernbert::MODEL_TYPE]);
    words.collect::<Vec<_>>().join(", ")
}

impl EncoderFamily {
    /// Whether a class gives scores instead of vectors.
    pub(crate) fn is_classifier(class: &str) -> bool {
        class.ends_with(CLASSIFIER)
    }

    /// Whether a class gives tokens scores.
    pub(crate) fn is_token_classifier(class: &str) -> bool {
        class.ends_with(TOKEN_CLASSIFIER)
    }

    /// The name of a part of the last projection, for messages.
    pub(super) fn head_out_name(&self, part: &str) -> String {
        format!("{}.{part}", self.head_out)
    }

    /// The name of a tensor as BERT spells it, without the prefix, and with the current names of a norm's
    /// parts: old checkpoints have `gamma` and `beta`.
    pub(super) fn plain_name(&self, name: &str) -> String {
        let name = name.strip_prefix(self.prefix).unwrap_or(name);
        let name = match name.rsplit_once('.') {
            Some((norm, "gamma")) => format!("{norm}.weight"),
            Some((norm, "beta")) => format!("{norm}.bias"),
            _ => name.to_owned(),
        };
        self.renames.iter().fold(name, |name, rename| name.replacen(rename.from, rename.to, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_those_of_bert() {
        let cases = [
            (&BERT, "bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
            (
                &roberta::ROBERTA,
                "roberta.encoder.layer.0.output.dense.bias",
                "encoder.layer.0.output.dense.bias",
            ),
            (&roberta::ROBERTA, "classifier.out_proj.weight", "classifier.out_proj.weight"),
            (
                &distilbert::DISTILBERT,
                "distilbert.transformer.layer.3.attention.q_lin.weight",
                "encoder.layer.3.attention.self.query.weight",
            ),
            (
                &distilbert::DISTILBERT,
                "distilbert.transformer.layer.3.attention.out_lin.bias",
                "encoder.layer.3.attention.output.dense.bias",
            ),
            (
                &distilbert::DISTILBERT,
                "transformer.layer.3.sa_layer_norm.weight",
                "encoder.layer.3.attention.output.LayerNorm.weight",
            ),
            (
                &distilbert::DISTILBERT,
                "transformer.layer.3.ffn.lin2.bias",
                "encoder.layer.3.output.dense.bias",
            ),
            (
                &distilbert::DISTILBERT,
                "transformer.layer.3.output_layer_norm.bias",
                "encoder.layer.3.output.LayerNorm.bias",
            ),
            (&electra::ELECTRA, "electra.embeddings_project.weight", "embeddings_project.weight"),
        ];
        for (family, name, wanted) in cases {
            assert_eq!(family.plain_name(name), wanted);
        }
    }

    #[test]
    fn every_family_with_biases_has_one_classifier_among_its_classes() {
        for family in FAMILIES {
            let classifiers = family.classes.split(", ").filter(|class| EncoderFamily::is_classifier(class));
            let wanted = usize::from(family.blocks == EncoderBlocks::Biased);
            assert_eq!(classifiers.count(), wanted, "{}", family.model_type);
            let of_tokens =
                family.classes.split(", ").filter(|class| EncoderFamily::is_token_classifier(class));
            assert_eq!(of_tokens.count(), wanted, "{}", family.model_type);
            assert_eq!(of_model_type(family.model_type).map(|found| found.prefix), Some(family.prefix));
        }
        assert!(of_model_type("deberta").is_none());
    }
}
