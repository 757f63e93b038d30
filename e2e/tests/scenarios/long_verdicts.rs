//! Verdicts of A/B tests over real models: the right winner with an interval that holds, a broken division,
//! a guardrail, and a promotion that is undone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};
use trustformers_e2e::{
    ab_test::{Tests, Visit, answers, bucket_of, figure, score, visit, visits},
    gateway::Gateway,
    model::{MINILM, condition, status_text},
    scenario::{Scenario, run},
    wait::Until,
};

/// A verdict follows a checkpoint, which comes every 30 s. Twice that, and some for a loaded machine.
const VERDICT_LIMIT_S: u64 = 75;
/// What the slow model waits for more texts, whether some come or not.
const DELAY_MS: u64 = 60;
/// Users of a test that divides 90 to 10: 560 of the smaller variant are expected and 500 needed, which is
/// 2.7 standard deviations below.
const USERS_OF_90_TO_10: usize = 5600;
/// Users of a test that divides evenly: 600 of each are expected, and 500 are 5.8 standard deviations below.
const USERS_OF_HALVES: usize = 1200;
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
    run("verdicts", async |scenario| {
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
        assert_eq!(status_text(&test, "/weights"), "100/0");
        let sampling = condition(&test, "Sampling").context("no condition Sampling")?;
        assert_eq!(sampling.reason, "GuardrailBroken");

        // And: the second one is invalid.
        let limit = Until::new("the broken division is found", VERDICT_LIMIT_S);
        let test = tests.until("divided", limit, has_verdict).await?;
        assert_eq!((status_text(&test, "/verdict"), status_text(&test, "/srm")), ("Invalid", "broken"));

        // And: the third one names the faster model, with an interval that holds what callers measured.
        let limit = Until::new("the faster model wins", VERDICT_LIMIT_S);
        let test = tests.until("compared", limit, has_verdict).await?;
        assert_eq!((status_text(&test, "/verdict"), status_text(&test, "/winner")), ("Winner", "control"));
        assert_eq!(status_text(&test, "/srm"), "ok");
        let truth = median_ms(&all, "treatment")? / median_ms(&all, "control")?;
        let end = |pointer: &str| figure(&test, "treatment", pointer).context("no interval");
        let (low, high) = (1.0 + end("/metrics/0/low")?, 1.0 + end("/metrics/0/high")?);
        eprintln!(
            "treatment by control: {truth:.2} as callers measured, from {low:.2} to {high:.2} by the test"
        );
        // Callers measure the way to the gateway too, which is the same for both and makes the ratio smaller.
        ensure!(low > 1.0 && truth < 1.05 * high && truth > 0.5 * low, "{truth} is not in {low}..{high}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn feedback_decides_and_the_promotion_can_be_undone() -> Result<()> {
    run("promotion", async |scenario| {
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
        let better = |visit: &Visit| if visit.variant == "treatment" { SCORE_EFFECT } else { 0.0 };
        score(&gateway, &all, |number, visit| (number % 2) as f64 + better(visit)).await?;
        let steady = SteadyVisits::start(&gateway, &name);

        // Then: the treatment wins, and the interval holds the difference.
        let limit = Until::new("the better scores win", VERDICT_LIMIT_S);
        let test = tests.until("scored", limit, has_verdict).await?;
        assert_eq!((status_text(&test, "/verdict"), status_text(&test, "/winner")), ("Winner", "treatment"));
        let end = |pointer: &str| figure(&test, "treatment", pointer).context("no interval");
        let (low, high) = (end("/metrics/0/low")?, end("/metrics/0/high")?);
        ensure!(low < SCORE_EFFECT && SCORE_EFFECT < high && low > 0.0, "{low}..{high}");

        // And: it gets every user, whose requests go on.
        let whole = |test: &DynamicObject| (status_text(test, "/weights") == "0/100").then_some(());
        tests.until("scored", Until::new("the winner has every user", 30), whole).await?;
        let control = |visit: &&Visit| visit.variant == "control";
        let moved: Vec<String> =
            all.iter().filter(control).take(20).map(|visit| visit.user.clone()).collect();
        all_get(&gateway, &name, &moved, "treatment").await?;

        // When: the promotion is undone. Then: the variants have their weights, and their users, again.
        tests.change("scored", json!({"onConclusion": "Report"})).await?;
        let undone = |test: &DynamicObject| (status_text(test, "/weights") == "50/50").then(|| test.clone());
        let test = tests.until("scored", Until::new("the weights are back", 15), undone).await?;
        let sampling = condition(&test, "Sampling").context("no condition Sampling")?;
        assert_eq!(sampling.reason, "PromotionUndone");
        let back = Until::new("some users get the control again", 15);
        back.polled(|| async {
            let again = visits(&gateway, &name, moved.clone()).await?;
            Ok(again.iter().any(|visit| visit.variant == "control").then_some(()))
        })
        .await?;

        // And: no request failed.
        let answered = steady.stop().await??;
        ensure!(answered >= 10, "{answered} requests beside the promotion");
        Ok(())
    })
    .await
}

/// Waits until these users get this variant.
async fn all_get(gateway: &Gateway, model: &str, users: &[String], variant: &str) -> Result<()> {
    let what = format!("{} users get {variant}", users.len());
    Until::new(&what, 15)
        .polled(|| async {
            let got = visits(gateway, model, users.to_vec()).await?;
            Ok(got.iter().all(|visit| visit.variant == variant).then_some(()))
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
                visit(&gateway, &model, format!("steady-{}", answered % 40)).await?;
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
