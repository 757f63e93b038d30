//! Plans with room for adapters, and what the oracle computes with one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::collections::BTreeMap;
use std::sync::Arc;

use trustformers_plan::oracle::Oracle;
use trustformers_plan::shard::{ShardError, shard};
use trustformers_plan::{
    Adapter, AdapterRoom, AdapterSlot, Backend, FusedOps, Hyper, KvType, Limits, LoadSpec, LogitsRows,
    LowRank, Numerics, Plan, PlanBuilder, PlanError, SequenceStep, StepError, StepInput, StepOutput, Weight,
    Weights,
};

const WIDTH: usize = 4;
const HYPER: Hyper =
    Hyper { width: WIDTH, layers: 1, heads: 2, kv_heads: 2, head_dim: 2, vocab: 3, context: 8 };
const LIMITS: Limits = Limits { rows: 4, sequences: 2, logits_rows: 2 };
const ROOM: AdapterRoom = AdapterRoom { slots: 2, rank: 1 };

/// The identity as embedding, projection and vocabulary head, so that logits show what a projection gives.
fn weights() -> Arc<Weights> {
    let identity = |rows: usize| -> Vec<f32> {
        (0..rows * WIDTH).map(|i| if i / WIDTH == i % WIDTH { 1.0 } else { 0.0 }).collect()
    };
    let mut weights = Weights::new();
    for (name, rows) in [("embedding", 3), ("up", WIDTH), ("gate", WIDTH)] {
        weights.push(Weight::from_f32(name, (rows, WIDTH), &identity(rows)).unwrap()).unwrap();
    }
    Arc::new(weights)
}

/// `logits = embedding · (up · embedding[token])`, gated where `gated`.
fn plan(weights: &Weights, gated: bool, fused: &FusedOps) -> Plan {
    let find = |name| weights.find(name).unwrap();
    let mut b = PlanBuilder::new(weights, HYPER, LIMITS);
    let x = b.embed(find("embedding"));
    let mut y = b.matmul(x, find("up"));
    if gated {
        let gate = b.matmul(x, find("gate"));
        y = b.silu_mul(gate, y);
    }
    let y = b.gather_rows(y);
    b.logits(y, find("embedding"));
    b.finish(fused).unwrap()
}

/// Adds `0.5 · 2 · x[1]` to the first output of `up`.
fn adapter(weights: &Weights) -> Adapter {
    let (down, up) = (vec![0.0, 2.0, 0.0, 0.0], vec![1.0, 0.0, 0.0, 0.0]);
    let change = LowRank { rank: 1, scale: 0.5, down, up };
    Adapter { name: "a".into(), changes: BTreeMap::from([(weights.find("up").unwrap(), change)]) }
}

fn step(token: &[u32], adapter: Option<AdapterSlot>, input: &mut StepInput) {
    input.push_sequence(SequenceStep {
        tokens: token,
        cached_tokens: 0,
        blocks: &[],
        logits: LogitsRows::Last,
    });
    input.choose_adapter(adapter);
}

#[test]
fn only_the_rows_of_a_sequence_with_an_adapter_change() {
    let weights = weights();
    let plan = plan(&weights, false, &FusedOps::NONE).with_adapters(ROOM).unwrap();
    assert!(plan.dump().contains("adapters: 2 slots of rank 1\n"), "{}", plan.dump());
    let spec = LoadSpec {
        weights: Arc::clone(&weights),
        plan: &plan,
        kv_blocks: 0,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let mut model = Oracle::new().load(spec).unwrap();
    let mut steps = model.compile(&plan).unwrap();
    model.put_adapter(AdapterSlot(1), &adapter(&weights)).unwrap();
    assert_eq!(model.memory().weights_bytes, 8 * 4);
    let (mut input, mut output) = (StepInput::new(), StepOutput::new());
    step(&[1], Some(AdapterSlot(1)), &mut input);
    step(&[1], None, &mut input);
    steps.submit(&input).unwrap();
    steps.wait(&mut output).unwrap();
    assert_eq!((output.row(0), output.row(1)), (&[1.0, 1.0, 0.0][..], &[0.0, 1.0, 0.0][..]));
    model.drop_adapter(AdapterSlot(1)).unwrap();
    assert_eq!(model.memory().weights_bytes, 0);
}

#[test]
fn a_projection_with_an_activation_has_no_room() {
    let weights = weights();
    let fused = plan(&weights, true, &FusedOps::ALL);
    let refused = fused.with_adapters(ROOM).unwrap_err();
    assert!(matches!(refused, PlanError::Shape { op: "matmul", .. }), "{refused}");
    plan(&weights, true, &FusedOps::ALL.without_activations()).with_adapters(ROOM).unwrap();
    let rankless = plan(&weights, false, &FusedOps::NONE).with_adapters(AdapterRoom { slots: 1, rank: 0 });
    assert!(matches!(rankless, Err(PlanError::Size { field: "adapters.rank", .. })), "{rankless:?}");
}

#[test]
fn a_step_chooses_only_slots_that_the_plan_has() {
    let weights = weights();
    let plain = plan(&weights, false, &FusedOps::NONE);
    let mut input = StepInput::new();
    step(&[1], Some(AdapterSlot(0)), &mut input);
    let refused = StepError::Adapter { sequence: 0, slot: AdapterSlot(0), slots: 0 };
    assert_eq!(input.validate(&plain, 0), Err(refused));
    let roomy = plain.clone().with_adapters(ROOM).unwrap();
    assert_eq!(input.validate(&roomy, 0), Ok(()));
    input.adapters.clear();
    assert!(matches!(input.validate(&roomy, 0), Err(StepError::Inconsistent(_))));
    let divided = shard(&roomy, &weights, 2, &FusedOps::NONE).map(|_| ());
    assert_eq!(divided, Err(ShardError::Adapters));
}
