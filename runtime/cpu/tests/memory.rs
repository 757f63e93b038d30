//! The memory that a model takes, as the allocator counts it: the estimate before the load is right, and
//! weights take what their stored types take. One test, because the counter is of the whole process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use trustformers_conformance::harness::KV_BLOCKS;
use trustformers_conformance::models::{Decoder, Encoder};
use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, DType, LoadSpec, MemoryReport, Numerics, Plan, Pooling, RopeLayout, WeightUse, Weights,
};

/// Records of the allocator, maps, names and the plan's copy: nothing that grows with a model's weights.
const BOOKKEEPING_BYTES: usize = 96 << 10;

/// The system's allocator, with counters.
struct Counting;

static ALLOCATED_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded unchanged; the counters have no part in it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let bytes = ALLOCATED_BYTES.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK_BYTES.fetch_max(bytes, Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATED_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Loads and compiles a plan, and compares the estimate with the allocator's count. Returns what the model
/// reports.
fn check(
    what: &str,
    backend: &mut CpuBackend,
    weights: &Arc<Weights>,
    plan: &Plan,
    numerics: Numerics,
) -> MemoryReport {
    let kv_blocks = if plan.uses_cache() { KV_BLOCKS } else { 0 };
    let spec = LoadSpec {
        weights: Arc::clone(weights),
        plan,
        kv_blocks,
        kv_type: backend.caps().default_kv_type(numerics),
        numerics,
        progress: &mut |_| {},
    };
    let before = ALLOCATED_BYTES.load(Ordering::Relaxed);
    let estimate = backend.estimate(&spec.estimate_spec()).unwrap();
    assert!(ALLOCATED_BYTES.load(Ordering::Relaxed) <= before, "{what}: the estimate keeps memory");
    PEAK_BYTES.store(before, Ordering::Relaxed);
    let mut model = backend.load(spec).unwrap();
    let executable = model.compile(plan).unwrap();
    let allocated = ALLOCATED_BYTES.load(Ordering::Relaxed) - before;
    let peak = PEAK_BYTES.load(Ordering::Relaxed) - before;
    let estimated = usize::try_from(estimate.total_bytes()).unwrap();
    for (count, bytes) in [("after the load", allocated), ("at most", peak)] {
        // Within 1 %, and a constant that does not grow with the model.
        let error = bytes.abs_diff(estimated);
        assert!(
            error <= estimated / 100 + BOOKKEEPING_BYTES,
            "{what}: {bytes} bytes were allocated {count}, {estimated} were estimated: {estimate:?}"
        );
    }
    let report = model.memory();
    assert!(report.total_bytes().abs_diff(estimate.total_bytes()) <= estimate.total_bytes() / 100, "{what}");
    drop((executable, model));
    let left = ALLOCATED_BYTES.load(Ordering::Relaxed).saturating_sub(before);
    assert!(left <= BOOKKEEPING_BYTES / 4, "{what}: {left} bytes are left after the model is gone");
    report
}

/// Stored bytes of the weights that projections use.
fn stored_bytes(weights: &Weights, plan: &Plan) -> u64 {
    let mut ids: Vec<_> = plan.ops().iter().flat_map(trustformers_plan::Op::weights).collect();
    ids.retain(|(_, how)| *how == WeightUse::Matrix);
    ids.sort_unstable();
    ids.dedup();
    ids.iter().map(|(id, _)| weights.get(*id).stored_bytes()).sum()
}

#[test]
fn memory_is_estimated_before_it_is_allocated() {
    let pairs = [
        (DType::F32, None),
        (DType::F16, None),
        (DType::BF16, None),
        (DType::Q8_0, None),
        (DType::Q4_0, None),
        (DType::Q4_K, None),
        (DType::Q6_K, None),
        (DType::Q4_K, Some(DType::Q6_K)),
        (DType::Q8_0, Some(DType::F16)),
    ];
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
        let config = CpuConfig { tier: Some(tier), threads: Some(2), ..CpuConfig::default() };
        let mut backend = CpuBackend::new(config).unwrap();
        let fused = backend.caps().fused;
        for numerics in [Numerics::Exact, Numerics::Fast] {
            for (dtype, mixed_with) in pairs {
                let decoder = Decoder { dtype, mixed_with, layout: RopeLayout::Neox, biased: true };
                let weights = decoder.weights().unwrap();
                let plan = decoder.plan(&weights, &fused).unwrap();
                let what = format!("{tier} {numerics:?} {decoder:?}");
                let report = check(&what, &mut backend, &weights, &plan, numerics);
                // Packed rows are filled up to groups of 16, and scales of the K quants to whole bytes. A
                // gate and an up projection of different types once became f32: up to eight times the stored
                // bytes.
                let stored = stored_bytes(&weights, &plan);
                assert!(
                    report.weights_bytes <= stored + stored / 8,
                    "{what}: {} bytes for {stored} stored ones",
                    report.weights_bytes
                );
            }
            for dtype in [DType::F32, DType::F16] {
                let encoder = Encoder { dtype, pooling: Pooling::Mean, normalise: true };
                let weights = encoder.weights().unwrap();
                let plan = encoder.plan(&weights, &fused).unwrap();
                let what = format!("{tier} {numerics:?} {encoder:?}");
                check(&what, &mut backend, &weights, &plan, numerics);
            }
        }
    }
}
