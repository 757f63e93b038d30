//! Verdicts of A/B tests over real models: the right winner with an interval that holds, a broken division,
//! a guardrail, a promotion that is undone, gateways that are replaced, and some that divide users wrongly.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};
use trustformers_e2e::{
    ab_test::{Counted, Tests, Visit, answers, bucket_of, figure, score, seen, visit, visits},
    gateway::Gateway,
    model::{MINILM, condition, status_text},
    release::{self, GATEWAY},
    scenario::{Scenario, run_within},
    wait::Until,
};

/// A verdict follows a checkpoint, which comes every 30 s. Twice that, and some for a loaded machine.
const VERDICT_LIMIT_S: u64 = 75;
/// The first two scenarios wait for two models (90 s each), a route (30 s), two verdicts or a verdict and
/// what follows (150 s), and send 8,000 requests at 100 a second: 440 s at worst, and 100 s on two idle
/// cores.
const LIMIT: Duration = Duration::from_secs(440);
/// What the slow model waits for more texts, whether some come or not.
const DELAY_MS: u64 = 60;
/// Users of a test that divides 90 to 10: 560 of the smaller variant are expected and 500 needed, which is
/// 2.7 standard deviations below.
const USERS_OF_90_TO_10: usize = 5600;
/// Users of a test that divides evenly: 600 of each are expected, and 500 are 5.8 standard deviations below.
const USERS_OF_HALVES: usize = 1200;
/// Users that are looked at around a promotion: half of them move, and none by chance to where all belong.
const USERS_THAT_MOVE: usize = 400;
/// A gateway has the new table within seconds, and so many requests take 4 s at 100 a second. Those that
/// began with the table before are sent again.
const MOVE_LIMIT_S: u64 = 30;
/// How much better the treatment's scores are.
const SCORE_EFFECT: f64 = 0.4;

fn users(prefix: &str, count: usize) -> impl Iterator<Item = String> {
    let prefix = prefix.to_owned();
    (0..count).map(move |number| format!("{prefix}-{number}"))
}

fn spec(route: &str, treatment: &str, weights: [u32; 2]) -> Value {
    json!({
        "route": route,
        "variants": [
            {"name": "control", "modelRef": {"name": "fast"}, "weight": weights[0]},
            {"name": "treatment", "modelRef": {"name": treatment}, "weight": weights[1]},
        ],
        "goal": {"metric": "latencyP50Ms", "direction": "Lower"},
        "stopWhen": {"minDuration": "1s"},
    })
}

async fn models(scenario: &Scenario, other: &str, runtime: Value) -> Result<()> {
    let models = scenario.models();
    models.apply("fast", json!({"source": {"uri": MINILM}})).await?;
    models.apply(other, json!({"source": {"uri": MINILM}, "runtime": runtime})).await?;
    models.ready("fast", 90).await?;
    models.ready(other, 90).await?;
    Ok(())
}

/// The number of a user of [`users`].
fn number_of(user: &str) -> u32 {
    user.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// What users say of their answers: half of them 1 more than the other half, whichever variant they have, and
/// those of the treatment [`SCORE_EFFECT`] more.
fn score_of(visit: &Visit) -> f64 {
    let better = if visit.variant == "treatment" { SCORE_EFFECT } else { 0.0 };
    f64::from(number_of(&visit.user) % 2) + better
}

/// Fails unless the test came to this verdict, and shows what it came to.
fn ensure_verdict(test: &DynamicObject, verdict: &str, winner: &str) -> Result<()> {
    let is_as_expected = status_text(test, "/verdict") == verdict && status_text(test, "/winner") == winner;
    ensure!(is_as_expected, "expected {verdict} {winner}; the status is\n{}", seen(test));
    Ok(())
}

/// Fails unless the test samples no more for this reason.
fn ensure_ended(test: &DynamicObject, reason: &str) -> Result<()> {
    let sampling = condition(test, "Sampling");
    let is_as_expected = sampling.is_some_and(|sampling| sampling.reason == reason);
    ensure!(is_as_expected, "expected Sampling to be {reason}; the status is\n{}", seen(test));
    Ok(())
}

/// The interval of the goal's effect.
fn interval(test: &DynamicObject) -> Result<[f64; 2]> {
    let end = |pointer: &str| {
        let end = figure(test, "treatment", pointer);
        end.with_context(|| format!("no {pointer} of the treatment; the status is\n{}", seen(test)))
    };
    Ok([end("/metrics/0/low")?, end("/metrics/0/high")?])
}

fn has_verdict(test: &DynamicObject) -> Option<DynamicObject> {
    (!status_text(test, "/verdict").is_empty()).then(|| test.clone())
}

fn median_ms(visits: &[Visit], variant: &str) -> Result<f64> {
    let of_variant = visits.iter().filter(|visit| visit.variant == variant);
    let mut latencies: Vec<Duration> = of_variant.map(|visit| visit.took).collect();
    latencies.sort_unstable();
    let median = latencies.get(latencies.len() / 2).context("no answer of the variant")?;
    Ok(median.as_secs_f64() * 1e3)
}

#[tokio::test]
async fn the_faster_model_wins_and_broken_tests_end() -> Result<()> {
    run_within("verdicts", LIMIT, async |scenario| {
        // Given: two models, one with a delay, and three tests over them.
        let delay = json!({"batching": {"strategy": "time", "maxWaitMs": DELAY_MS}});
        models(scenario, "slow", delay).await?;
        let (gateway, tests) =
            (scenario.gateway().await?, Tests::new(&scenario.cluster, &scenario.namespace));
        let name = |route: &str| format!("{}/{route}", scenario.namespace);
        let mut guarded = spec("guarded", "slow", [50, 50]);
        guarded["guardrails"] = json!([{"metric": "latencyP95Ms", "max": DELAY_MS / 2}]);
        tests.apply("guarded", &guarded).await?;
        let divided = tests.apply("divided", &spec("divided", "slow", [90, 10])).await?;
        tests.apply("compared", &spec("compared", "slow", [90, 10])).await?;
        for route in ["guarded", "divided", "compared"] {
            answers(&gateway, &name(route)).await?;
        }

        // When: users come to each. Half of the control's users of `divided` never reach the gateway, as
        // behind a cache that answers them.
        visits(&gateway, &name("guarded"), users("g", 300)).await?;
        let uid = divided.metadata.uid.context("a test without a UID")?;
        let reach = |user: &String| bucket_of(&uid, user) >= 9000 || bucket_of("cache", user) % 2 == 0;
        visits(&gateway, &name("divided"), users("d", 2400).filter(reach)).await?;
        let all = visits(&gateway, &name("compared"), users("c", USERS_OF_90_TO_10)).await?;

        // Then: the guardrail has ended the first test, and the control answers everybody.
        let stopped = |test: &DynamicObject| (status_text(test, "/phase") == "Stopped").then(|| test.clone());
        let test = tests.until("guarded", Until::new("the guardrail ends the test", 30), stopped).await?;
        ensure!(status_text(&test, "/weights") == "100/0", "the status is\n{}", seen(&test));
        ensure_ended(&test, "GuardrailBroken")?;

        // And: the second one is invalid.
        let limit = Until::new("the broken division is found", VERDICT_LIMIT_S);
        let test = tests.until("divided", limit, has_verdict).await?;
        ensure_verdict(&test, "Invalid", "")?;
        ensure!(status_text(&test, "/srm") == "broken", "the status is\n{}", seen(&test));

        // And: the third one names the faster model, with an interval that holds what callers measured.
        let limit = Until::new("the faster model wins", VERDICT_LIMIT_S);
        let test = tests.until("compared", limit, has_verdict).await?;
        ensure_verdict(&test, "Winner", "control")?;
        ensure!(status_text(&test, "/srm") == "ok", "the status is\n{}", seen(&test));
        let truth = median_ms(&all, "treatment")? / median_ms(&all, "control")?;
        let [low, high] = interval(&test)?.map(|end| 1.0 + end);
        eprintln!(
            "treatment by control: {truth:.2} as callers measured, from {low:.2} to {high:.2} by the test"
        );
        // Callers measure the way to the gateway too, which is the same for both and makes the ratio smaller.
        ensure!(
            low > 1.0 && truth < 1.05 * high && truth > 0.5 * low,
            "{truth} is not in {low}..{high}; the status is\n{}",
            seen(&test)
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn feedback_decides_and_the_promotion_can_be_undone() -> Result<()> {
    run_within("promotion", LIMIT, async |scenario| {
        // Given: two models of equal speed, and a test by scores that promotes its winner.
        models(scenario, "twin", json!({})).await?;
        let (gateway, tests) =
            (scenario.gateway().await?, Tests::new(&scenario.cluster, &scenario.namespace));
        let name = format!("{}/scored", scenario.namespace);
        let mut scored = spec("scored", "twin", [50, 50]);
        scored["goal"] = json!({"metric": "feedbackScore", "direction": "Higher", "smallestEffect": 0.3});
        (scored["onConclusion"], scored["promoteHold"]) = (json!("Promote"), json!("5s"));
        tests.apply("scored", &scored).await?;
        answers(&gateway, &name).await?;

        // When: every user scores an answer, and those of the treatment are better by a known difference.
        let all = visits(&gateway, &name, users("s", USERS_OF_HALVES)).await?;
        score(&gateway, &all, score_of).await?;
        let steady = SteadyVisits::start(&gateway, &name);

        // Then: the treatment wins, and the interval holds the difference.
        let limit = Until::new("the better scores win", VERDICT_LIMIT_S);
        let test = tests.until("scored", limit, has_verdict).await?;
        ensure_verdict(&test, "Winner", "treatment")?;
        let [low, high] = interval(&test)?;
        eprintln!("scores are better by {SCORE_EFFECT}, by {low:.2} to {high:.2} as the test says");
        ensure!(
            low < SCORE_EFFECT && SCORE_EFFECT < high && low > 0.0,
            "{SCORE_EFFECT} is not in {low}..{high}; the status is\n{}",
            seen(&test)
        );

        // And: it gets every user, whose requests go on.
        let whole = |test: &DynamicObject| (status_text(test, "/weights") == "0/100").then_some(());
        tests.until("scored", Until::new("the winner has every user", 30), whole).await?;
        let some = &all[..USERS_THAT_MOVE];
        all_get(&gateway, &name, some, |_| "treatment").await?;

        // When: the promotion is undone. Then: the variants have their weights again, and every user the
        // variant of before.
        tests.change("scored", json!({"onConclusion": "Report"})).await?;
        let undone = |test: &DynamicObject| (status_text(test, "/weights") == "50/50").then(|| test.clone());
        let test = tests.until("scored", Until::new("the weights are back", 15), undone).await?;
        ensure_ended(&test, "PromotionUndone")?;
        all_get(&gateway, &name, some, |visit| &visit.variant).await?;

        // And: no request failed.
        let answered = steady.stop().await??;
        ensure!(answered >= 10, "{answered} requests beside the promotion");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn gateways_that_are_replaced_report_their_last_requests() -> Result<()> {
    run_within("replaced", LIMIT, async |scenario| {
        // Given: a test over two models.
        models(scenario, "twin", json!({})).await?;
        let (gateway, tests) =
            (scenario.gateway().await?, Tests::new(&scenario.cluster, &scenario.namespace));
        let name = format!("{}/replaced", scenario.namespace);
        tests.apply("replaced", &spec("replaced", "twin", [50, 50])).await?;
        let mut counted = Counted::default();
        counted.add(vec![answers(&gateway, &name).await?]);

        // When: users come, the gateways are replaced before the next checkpoint, and some users come again.
        counted.add(visits(&gateway, &name, users("r", 300)).await?);
        release::replace_pods(&scenario.cluster, GATEWAY).await?;
        counted.add(vec![answers(&gateway, &name).await?]);
        counted.add(visits(&gateway, &name, users("r", 100)).await?);

        // Then: the status has the callers' counts, to the last request.
        let limit = Until::new("the status has the callers' counts", VERDICT_LIMIT_S);
        tests.until("replaced", limit, |test| counted.equals(test).then_some(())).await
    })
    .await
}

#[tokio::test]
async fn a_splitter_that_divides_wrongly_makes_a_test_invalid() -> Result<()> {
    run_within("splitter", LIMIT, async |scenario| {
        // Given: two models of equal speed, and gateways that give the treatment to a tenth of the control's
        // users.
        models(scenario, "twin", json!({})).await?;
        release::with_fault(&scenario.cluster, "--fault=split-skew=0.1").await?;
        let outcome = the_division_is_found_broken(scenario).await;
        // Also after a failure: the scenarios after this one expect gateways without a fault.
        release::without_fault(&scenario.cluster).await?;
        outcome
    })
    .await
}

async fn the_division_is_found_broken(scenario: &Scenario) -> Result<()> {
    // When: users come to a test that divides 90 to 10, who are served as 81 to 19.
    let (gateway, tests) = (scenario.gateway().await?, Tests::new(&scenario.cluster, &scenario.namespace));
    let name = format!("{}/skewed", scenario.namespace);
    tests.apply("skewed", &spec("skewed", "twin", [90, 10])).await?;
    answers(&gateway, &name).await?;
    let all = visits(&gateway, &name, users("k", USERS_OF_HALVES)).await?;
    let treated = all.iter().filter(|visit| visit.variant == "treatment").count();
    // 228 expected, and 120 without the fault; five standard deviations are 68 and 52.
    ensure!((173..=296).contains(&treated), "{treated} of {} users got the treatment", all.len());

    // Then: the test says that nothing can be said.
    let limit = Until::new("the broken splitter is found", VERDICT_LIMIT_S);
    let test = tests.until("skewed", limit, has_verdict).await?;
    ensure_verdict(&test, "Invalid", "")?;
    ensure!(status_text(&test, "/srm") == "broken", "the status is\n{}", seen(&test));
    ensure_ended(&test, "SampleRatioMismatch")
}

/// Waits until the users of these visits get the variant that `expected` names.
async fn all_get(
    gateway: &Gateway,
    model: &str,
    before: &[Visit],
    expected: impl Fn(&Visit) -> &str,
) -> Result<()> {
    let what = format!("{} users get the variant that is expected", before.len());
    let expected: BTreeMap<&str, &str> =
        before.iter().map(|visit| (visit.user.as_str(), expected(visit))).collect();
    Until::new(&what, MOVE_LIMIT_S)
        .polled(|| async {
            let users = before.iter().map(|visit| visit.user.clone());
            let got = visits(gateway, model, users).await?;
            let is_other =
                |visit: &&Visit| expected.get(visit.user.as_str()) != Some(&visit.variant.as_str());
            let others = got.iter().filter(is_other).count();
            // The last error becomes part of the message at the limit.
            ensure!(others == 0, "{others} of them get another one");
            Ok(Some(()))
        })
        .await
}

/// Users that come four times a second until stopped.
struct SteadyVisits {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<usize>>,
}

impl SteadyVisits {
    fn start(gateway: &Gateway, model: &str) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (gateway, model) = (gateway.clone(), model.to_owned());
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(250));
            let mut answered = 0;
            while !*stopped.borrow() {
                ticks.tick().await;
                let asked = visit(&gateway, &model, format!("steady-{}", answered % 40)).await;
                asked.with_context(|| format!("request {answered} beside the promotion failed"))?;
                answered += 1;
            }
            anyhow::Ok(answered)
        });
        Self { stop, task }
    }

    async fn stop(self) -> Result<Result<usize>> {
        // The task may have ended with a failure: its result says so.
        let _ = self.stop.send(true);
        Ok(self.task.await?)
    }
}
