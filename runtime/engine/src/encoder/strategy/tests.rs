//! Tables of arrivals and decisions: no clock, no thread.

use super::*;

const fn us(us: u64) -> Moment {
    Duration::from_micros(us)
}

fn rules(strategy: BatchStrategy) -> BatchRules {
    let by_class = strategy == BatchStrategy::Priority;
    BatchRules { strategy, max_wait: us(10_000), by_class, max_texts: 4, max_tokens: 100 }
}

/// A batcher whose device takes `fixed_us` for each step and 10 us for each token.
fn trained(strategy: BatchStrategy, fixed_us: u64) -> Batcher<usize> {
    let mut batcher = Batcher::new(rules(strategy));
    for tokens in [32, 8, 64, 8, 64, 8] {
        batcher.step_done(us(0), tokens, us(fixed_us + 10 * tokens as u64));
    }
    batcher
}

/// A text without a tenant.
fn push(batcher: &mut Batcher<usize>, at_us: u64, class: Priority, tokens: usize, item: usize) {
    let text = NewText { arrived: us(at_us), class, tenant: TenantId::NONE, tokens };
    batcher.push(text, item);
}

/// A request of one text of 10 tokens.
fn request(batcher: &mut Batcher<usize>, at_us: u64, item: usize) {
    batcher.record_arrival(us(at_us));
    push(batcher, at_us, Priority::Normal, 10, item);
}

/// Texts of 10 tokens each, of a request of this tenant.
fn list(
    batcher: &mut Batcher<usize>,
    class: Priority,
    tenant: &str,
    items: std::ops::Range<usize>,
) -> TenantId {
    let tenant = batcher.request_arrived(&Tenant::from(tenant));
    let text = NewText { arrived: us(0), class, tenant, tokens: 10 };
    items.for_each(|item| batcher.push(text, item));
    tenant
}

fn next_batch(batcher: &mut Batcher<usize>) -> Vec<usize> {
    let mut batch = Vec::new();
    batcher.take_batch(&mut batch);
    batch
}

#[test]
fn every_strategy_is_idle_without_texts() {
    for strategy in BatchStrategy::ALL {
        assert_eq!(Batcher::<()>::new(rules(strategy)).decide(us(5)), Decision::Idle, "{strategy}");
        assert_eq!(strategy.as_str().parse(), Ok(strategy));
    }
    assert!("fast".parse::<BatchStrategy>().unwrap_err().contains("\"dynamic\""));
}

#[test]
fn time_and_size_begin_steps_as_documented() {
    use Decision::{Run, Until};
    // The first text arrives at 1 ms. The second column is the number of texts at 3 ms.
    let cases = [
        (BatchStrategy::Time, 1, Until(us(11_000))),
        (BatchStrategy::Time, 4, Until(us(11_000))),
        (BatchStrategy::Time, 9, Until(us(11_000))),
        (BatchStrategy::Size, 3, Until(us(11_000))),
        (BatchStrategy::Size, 4, Run),
        (BatchStrategy::Size, 9, Run),
    ];
    for (strategy, texts, wanted) in cases {
        let mut batcher = trained(strategy, 2000);
        (0..texts).for_each(|item| request(&mut batcher, 1000 + item as u64, item));
        assert_eq!(batcher.decide(us(3000)), wanted, "{strategy} {texts}");
        assert_eq!(batcher.decide(us(11_000)), Run, "{strategy} {texts}: the window ends");
    }
}

#[test]
fn tokens_fill_a_batch_like_texts() {
    let mut batcher = Batcher::new(rules(BatchStrategy::Size));
    push(&mut batcher, 0, Priority::Normal, 60, 1);
    assert!(matches!(batcher.decide(us(1)), Decision::Until(_)));
    push(&mut batcher, 0, Priority::Normal, 60, 2);
    push(&mut batcher, 0, Priority::Normal, 20, 3);
    assert_eq!(batcher.decide(us(1)), Decision::Run);
    // A long text is not bypassed by shorter ones.
    assert_eq!((next_batch(&mut batcher), next_batch(&mut batcher), batcher.len()), (vec![1], vec![2, 3], 0));
}

#[test]
fn dynamic_never_waits_where_waiting_saves_nothing() {
    // Gap between requests and fixed cost of a step: sparse requests, and a device without a fixed cost.
    for (gap_us, fixed_us) in [(5000, 2000), (100_000, 2000), (2000, 2000), (50, 0)] {
        let mut batcher = trained(BatchStrategy::Dynamic, fixed_us);
        for item in 0..12 {
            let at = 1_000_000 + item as u64 * gap_us;
            request(&mut batcher, at, item);
            assert_eq!(batcher.decide(us(at)), Decision::Run, "gap {gap_us} fixed {fixed_us} request {item}");
            assert_eq!(next_batch(&mut batcher), [item]);
        }
    }
    let mut untrained = Batcher::new(rules(BatchStrategy::Dynamic));
    (0..3).for_each(|item| request(&mut untrained, item as u64, item));
    assert_eq!(untrained.decide(us(3)), Decision::Run);
}

#[test]
fn dynamic_waits_only_while_another_text_pays() {
    // Requests every 100 us before a device whose steps cost 2 ms each.
    let batcher_with = |waiting: usize| {
        let mut batcher = trained(BatchStrategy::Dynamic, 2000);
        (0..8).for_each(|item| request(&mut batcher, item * 100, item as usize));
        batcher.retain(|item| *item >= 8 - waiting);
        batcher
    };
    // The next one is expected 100 us after the last, which arrived at 700.
    assert_eq!(batcher_with(1).decide(us(700)), Decision::Until(us(800)));
    assert_eq!(batcher_with(3).decide(us(750)), Decision::Until(us(800)));
    assert_eq!(batcher_with(3).decide(us(800)), Decision::Run, "no text arrived in time");
    assert_eq!(batcher_with(4).decide(us(700)), Decision::Run, "the batch is full");
    // Three texts that wait 900 us for one more lose more than the 2 ms that it saves.
    let mut slow = trained(BatchStrategy::Dynamic, 2000);
    for (item, at) in [0, 900, 1800, 2700, 3600, 4500].into_iter().enumerate() {
        request(&mut slow, at, item);
    }
    slow.retain(|item| *item >= 3);
    assert_eq!(slow.decide(us(4500)), Decision::Run);
    slow.retain(|item| *item >= 4);
    assert_eq!(slow.decide(us(4500)), Decision::Until(us(5400)));
    // The window is never longer than the time that it can save.
    let mut batcher = trained(BatchStrategy::Dynamic, 2000);
    (0..7).for_each(|item| request(&mut batcher, item * 300, item as usize));
    batcher.retain(|item| [0, 6].contains(item));
    let Decision::Until(at) = batcher.decide(us(1800)) else { panic!("{:?}", batcher.decide(us(1800))) };
    assert!(
        (1999..=2001).contains(&at.as_micros()),
        "the next is expected at 2100, too late for the first: {at:?}"
    );
}

#[test]
fn dynamic_waits_after_a_step_for_callers_that_return() {
    let mut batcher = trained(BatchStrategy::Dynamic, 2000);
    (0..6).for_each(|item| request(&mut batcher, item * 50, item as usize));
    assert_eq!(next_batch(&mut batcher), [0, 1, 2, 3]);
    // Two arrived during the step, which ends at 9 ms. The four callers that have their answers may return at
    // once.
    batcher.step_done(us(9000), 40, us(2400));
    assert_eq!(batcher.decide(us(9000)), Decision::Until(us(9050)));
    request(&mut batcher, 9020, 6);
    // A long gap is among the last four now, so the step begins at once.
    assert_eq!(batcher.decide(us(9020)), Decision::Run);
}

#[test]
fn a_saturated_device_runs_full_batches_without_a_pause() {
    for strategy in BatchStrategy::ALL {
        let mut batcher = trained(strategy, 2000);
        let (mut now, mut item, mut sizes) = (20_000, 0, Vec::new());
        for _ in 0..20 {
            // Ten arrive while a step of 2.4 ms runs.
            for _ in 0..10 {
                request(&mut batcher, now - 11_000, item);
                item += 1;
            }
            assert_eq!(batcher.decide(us(now)), Decision::Run, "{strategy}");
            sizes.push(next_batch(&mut batcher).len());
            now += 2400;
            batcher.step_done(us(now), 40, us(2400));
        }
        assert!(sizes.iter().all(|size| *size == 4), "{strategy} {sizes:?}");
    }
}

#[test]
fn classes_decide_the_order_only_where_they_count() {
    use Priority::{High, Low, Normal};
    let order = |strategy, by_class| {
        let mut batcher = Batcher::new(BatchRules { max_texts: 8, by_class, ..rules(strategy) });
        for (item, class) in [Low, Normal, Low, High, Normal].into_iter().enumerate() {
            push(&mut batcher, item as u64, class, 10, item);
        }
        next_batch(&mut batcher)
    };
    for strategy in BatchStrategy::ALL {
        assert_eq!(order(strategy, false), [0, 1, 2, 3, 4], "{strategy}");
        assert_eq!(order(strategy, true), [3, 1, 4, 0, 2], "{strategy}");
    }
}

#[test]
fn no_class_is_bypassed_for_ever() {
    let mut batcher = Batcher::new(rules(BatchStrategy::Priority));
    let mut order = Vec::new();
    push(&mut batcher, 0, Priority::Low, 10, 1000);
    push(&mut batcher, 0, Priority::Normal, 10, 2000);
    for step in 0..6 {
        // More texts of class high arrive than a step takes.
        (0..5).for_each(|item| push(&mut batcher, step, Priority::High, 10, item));
        order.extend(next_batch(&mut batcher));
    }
    let at = |item| order.iter().position(|other| *other == item);
    assert_eq!((at(2000), at(1000)), (Some(8), Some(16)), "{order:?}");
}

#[test]
fn many_texts_leave_room_for_other_tenants() {
    let mut batcher = Batcher::new(rules(BatchStrategy::Dynamic));
    list(&mut batcher, Priority::Normal, "long", 0..100);
    assert_eq!(next_batch(&mut batcher), [0, 1, 2, 3]);
    let short = list(&mut batcher, Priority::Normal, "short", 200..201);
    // Both start at the same count, so the older one is first; then the other tenant is next.
    assert_eq!(next_batch(&mut batcher), [4, 200, 5, 6]);
    batcher.request_ended(short);
    list(&mut batcher, Priority::Normal, "other", 300..400);
    assert_eq!(next_batch(&mut batcher), [7, 300, 8, 301]);
    // Tenants are charged by tokens: the one with long texts has fewer of them in a step.
    let mut batcher = Batcher::new(BatchRules { max_texts: 16, ..rules(BatchStrategy::Dynamic) });
    list(&mut batcher, Priority::Normal, "short", 0..100);
    let tenant = batcher.request_arrived(&Tenant::from("long"));
    let text = NewText { arrived: us(0), class: Priority::Normal, tenant, tokens: 40 };
    (200..300).for_each(|item| batcher.push(text, item));
    assert_eq!(next_batch(&mut batcher), [0, 200, 1, 2, 3, 4]);
    // A class precedes all tenants of the next one.
    let mut batcher = Batcher::new(rules(BatchStrategy::Priority));
    list(&mut batcher, Priority::High, "much", 0..3);
    list(&mut batcher, Priority::Normal, "little", 10..11);
    assert_eq!(next_batch(&mut batcher), [0, 1, 2, 10]);
}

#[test]
fn a_text_of_class_high_does_not_wait() {
    for (strategy, by_class) in
        [(BatchStrategy::Priority, true), (BatchStrategy::Time, true), (BatchStrategy::Time, false)]
    {
        let mut batcher = Batcher::new(BatchRules { by_class, ..rules(strategy) });
        push(&mut batcher, 0, Priority::Low, 10, 0);
        push(&mut batcher, 0, Priority::High, 10, 1);
        let wanted = if by_class { Decision::Run } else { Decision::Until(us(10_000)) };
        assert_eq!(batcher.decide(us(5)), wanted, "{strategy}");
    }
}

#[test]
fn removed_texts_leave_the_counts() {
    let mut batcher = Batcher::new(rules(BatchStrategy::Size));
    (0..9).for_each(|item| push(&mut batcher, 0, Priority::Normal, 30, item));
    batcher.retain(|item| item % 3 == 0);
    assert_eq!((batcher.len(), batcher.tokens), (3, 90));
    assert!(matches!(batcher.decide(us(1)), Decision::Until(_)), "neither full by texts nor by tokens");
    assert_eq!(next_batch(&mut batcher), [0, 3, 6]);
    assert_eq!((batcher.len(), batcher.tokens, batcher.decide(us(1))), (0, 0, Decision::Idle));
}
