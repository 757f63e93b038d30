//! A model that is gone has returned its memory to the system, as the system itself counts it. One test,
//! because the count is of the whole process.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use trustformers_conformance::models::Decoder;
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_plan::{Backend, DType, KvType, LoadSpec, Numerics, RopeLayout};

const MIB: u64 = 1 << 20;

/// Blocks of a cache of 128 MiB.
const KV_BLOCKS: usize = 16 << 10;

/// Bytes that the process has in memory.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn an_unloaded_model_returns_its_memory_to_the_system() {
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };
    let weights = decoder.weights().unwrap();
    let mut backend = CpuBackend::new(CpuConfig { threads: Some(2), ..CpuConfig::default() }).unwrap();
    let plan = decoder.plan(&weights, &backend.caps().fused).unwrap();
    let before = resident_bytes();
    for round in 0..3 {
        let spec = LoadSpec {
            weights: Arc::clone(&weights),
            plan: &plan,
            kv_blocks: KV_BLOCKS,
            kv_type: KvType::F32,
            numerics: Numerics::Exact,
            progress: &mut |_| {},
        };
        let mut model = backend.load(spec).unwrap();
        let executable = model.compile(&plan).unwrap();
        let loaded = resident_bytes();
        assert_eq!(model.memory().kv_bytes, 128 * MIB);
        assert!(loaded >= before + 128 * MIB, "round {round}: {before} bytes before, {loaded} loaded");
        drop((executable, model));
        let after = resident_bytes();
        // What the allocator keeps for the next small allocations does not grow with the rounds.
        assert!(after <= before + 8 * MIB, "round {round}: {before} bytes before, {after} after");
    }
    // A cache that may change its size returns blocks while the model stays.
    let plan = plan.with_kv_room(KV_BLOCKS + 1);
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: KV_BLOCKS,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let mut model = backend.load(spec).unwrap();
    let loaded = resident_bytes();
    assert!(loaded >= before + 128 * MIB, "{before} bytes before, {loaded} loaded");
    model.resize_kv(KV_BLOCKS / 4).unwrap();
    let (shrunk, wanted) = (resident_bytes(), before + 32 * MIB);
    assert_eq!(model.memory().kv_bytes, 32 * MIB);
    assert!((wanted..wanted + 8 * MIB).contains(&shrunk), "{before} bytes before, {shrunk} with a quarter");
    drop(model);
    let after = resident_bytes();
    assert!(after <= before + 8 * MIB, "{before} bytes before, {after} after");
}
