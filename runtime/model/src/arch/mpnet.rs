//! MPNet: BERT without token types, whose positions begin at the third row of their table. Each head adds a
//! learned value for the distance of a key to its scores; all layers share them.

use super::encoder_family::{EncoderBlocks, EncoderFamily, FirstPosition, HeadActivation, rename};

pub(super) const MPNET: EncoderFamily = EncoderFamily {
    model_type: "mpnet",
    classes: "MPNetModel, MPNetForMaskedLM, MPNetForSequenceClassification, MPNetForTokenClassification",
    prefix: "mpnet.",
    renames: &[
        rename("attention.attn.q.", "attention.self.query."),
        rename("attention.attn.k.", "attention.self.key."),
        rename("attention.attn.v.", "attention.self.value."),
        rename("attention.attn.o.", "attention.output.dense."),
        rename("attention.LayerNorm.", "attention.output.LayerNorm."),
    ],
    unused: &["pooler.", "lm_head."],
    head_dense: "classifier.dense",
    head_out: "classifier.out_proj",
    head_activation: HeadActivation::Tanh,
    token_types: false,
    // The library counts from the id of padding that MPNet was trained with, also where a file says another.
    first_position: FirstPosition::Fixed(2),
    distances: true,
    blocks: EncoderBlocks::Biased,
};

/// Rows of the table of learned values: the buckets of distances.
pub(crate) const BUCKETS: usize = 32;
/// The first distance on either side that shares its bucket.
const SHARED: usize = 8;

/// The values that scores take, by head and distance, from those of the file, by bucket and head. Distances
/// go up to `reach` on either side.
pub(super) fn by_distance(table: &[f32], heads: usize, reach: usize) -> Vec<f32> {
    // A text is shorter than 2^31 tokens.
    let reach = reach as isize;
    let of_head = |head: usize| (-reach..=reach).map(move |distance| table[bucket(distance) * heads + head]);
    (0..heads).flat_map(of_head).collect()
}

/// The bucket of a key that many positions after the row: the first half is of keys before it. Near distances
/// have one each, from 8 on there are two for each doubling, and the last one has no end.
fn bucket(distance: isize) -> usize {
    let (half, far) = (BUCKETS / 2, distance.unsigned_abs());
    // SHARED + floor(2 * log2(far / SHARED)), in integers.
    let own = if far < SHARED { far } else { SHARED + (far * far / (SHARED * SHARED)).ilog2() as usize };
    own.min(half - 1) + if distance > 0 { half } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::{SeededCheckpoint, SeededEncoderFamily};
    use crate::{Model, PlanRequest};
    use serde_json::{Value, json};
    use trustformers_plan::{FusedOps, Limits};

    fn load(labels: usize, keys: Value) -> Result<Model, String> {
        let family = SeededEncoderFamily::MpNet;
        let folder = tempfile::tempdir().unwrap();
        SeededCheckpoint { family, labels, keys, ..SeededCheckpoint::default() }
            .write(folder.path())
            .unwrap();
        Model::load(folder.path(), &mut |_| {}).map_err(|error| error.to_string())
    }

    #[test]
    fn names_become_those_of_bert() {
        for (name, wanted) in [
            ("mpnet.encoder.layer.1.attention.attn.q.weight", "encoder.layer.1.attention.self.query.weight"),
            ("encoder.layer.1.attention.attn.o.bias", "encoder.layer.1.attention.output.dense.bias"),
            ("encoder.layer.1.attention.LayerNorm.bias", "encoder.layer.1.attention.output.LayerNorm.bias"),
            ("encoder.layer.1.output.LayerNorm.bias", "encoder.layer.1.output.LayerNorm.bias"),
        ] {
            assert_eq!(MPNET.plain_name(name), wanted);
        }
    }

    #[test]
    fn distances_have_the_buckets_of_the_published_rule() {
        // The greatest distance of each bucket of keys before a row.
        let ends = [0, 1, 2, 3, 4, 5, 6, 7, 11, 15, 22, 31, 45, 63, 90];
        for (own, end) in ends.into_iter().enumerate() {
            assert_eq!((bucket(-end), bucket(-end - 1)), (own, own + 1));
            if end > 0 {
                assert_eq!((bucket(end), bucket(end + 1)), (16 + own, 17 + own));
            }
        }
        assert_eq!((bucket(1), bucket(-128), bucket(-100_000), bucket(100_000)), (17, 15, 15, 31));
    }

    #[test]
    fn values_stand_by_head_and_distance() {
        let table: Vec<f32> = (0..BUCKETS * 2).map(|index| index as f32).collect();
        let of = |bucket: usize, head: usize| (bucket * 2 + head) as f32;
        let wanted = [2, 1, 0, 17, 18].map(|bucket| of(bucket, 0)).into_iter();
        let wanted = wanted.chain([2, 1, 0, 17, 18].map(|bucket| of(bucket, 1)));
        assert_eq!(by_distance(&table, 2, 2), wanted.collect::<Vec<_>>());
    }

    #[test]
    fn every_layer_adds_the_values_and_nothing_else_differs_from_bert() {
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 0 };
        let request = PlanRequest { context_tokens: 12, limits, fused: FusedOps::NONE };
        let dump = load(0, json!({})).unwrap().plan(&request).unwrap().dump();
        let attentions: Vec<&str> = dump.lines().filter(|line| line.contains("encoder_attention")).collect();
        assert_eq!(attentions.len(), 2, "{dump}");
        assert!(attentions.iter().all(|line| line.contains(" distances by_distance ")), "{dump}");
        assert!(!dump.contains("token_type") && !dump.contains(" rope "), "{dump}");
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        let cases = [
            (json!({"relative_attention_num_buckets": 16}), "key relative_attention_num_buckets is 16"),
            (json!({"hidden_act": "relu"}), "key hidden_act is \"relu\""),
            (json!({"architectures": ["MPNetForQuestionAnswering"]}), "key architectures is"),
            (json!({"max_position_embeddings": 2}), "key max_position_embeddings: a text begins at row 2"),
        ];
        for (keys, wanted) in cases {
            let error = load(0, keys).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
