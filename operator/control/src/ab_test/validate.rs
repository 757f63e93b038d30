//! Reads the spec of a test once into a type that every later step uses, and finds what it conflicts with.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{
    ABTest, AssignBy, Assignment, Cost, Goal, Guardrail, Layer, Metric, OnConclusion, RampStep,
    SecondaryMetric, TestShadow,
};

use super::assign::running_test;
use crate::routes::ModelKey;
use crate::{duration, hash};

/// Longest duration of a test.
const LONGEST: Duration = Duration::from_secs(90 * 24 * 3600);

/// A test that can be honoured.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedTest {
    /// Namespace and name.
    pub key: ModelKey,
    /// UID.
    pub uid: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// When it was created.
    pub created: Timestamp,
    /// The name that callers use, without its namespace.
    pub route: String,
    /// The variants, the control first.
    pub variants: Vec<ValidatedVariant>,
    /// Who gets which variant.
    pub assignment: Assignment,
    /// How long all users get the control before.
    pub baseline: Option<Duration>,
    /// The steps towards the weights.
    pub ramp: Vec<ValidatedRampStep>,
    /// What decides.
    pub goal: Goal,
    /// What is compared besides.
    pub secondary: Vec<SecondaryMetric>,
    /// Limits.
    pub guardrails: Vec<Guardrail>,
    /// Probability of a wrong verdict: one less the confidence.
    pub alpha: f64,
    /// Users that each variant needs.
    pub min_samples: u64,
    /// No verdict comes earlier.
    pub min_duration: Duration,
    /// The test ends then.
    pub max_duration: Duration,
    /// What happens when a variant has won.
    pub on_conclusion: OnConclusion,
    /// How long a step of the promotion lasts.
    pub promote_hold: Duration,
    /// Hash of what restarts the samples when it changes. Weights and ramp do not.
    pub samples_of: String,
    /// The spec as JSON, which the status keeps.
    pub spec: String,
}

/// One variant.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedVariant {
    /// Its name.
    pub name: String,
    /// The model, in the test's namespace.
    pub model: String,
    /// The only revision that serves it, if it is one.
    pub revision: Option<String>,
    /// Percent of the users.
    pub weight: u32,
    /// What its requests cost.
    pub cost: Option<Cost>,
}

/// One step towards the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValidatedRampStep {
    /// Percent of its weight that each variant behind the control gets.
    pub percent: u32,
    /// How long it lasts.
    pub hold: Duration,
}

/// Why a spec cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
pub enum TestSpecError {
    /// The stored object has no name, namespace or UID.
    #[error("a stored ABTest has no name, namespace or UID")]
    Incomplete,
    /// A duration cannot be read.
    #[error("{field} is {text:?}: write whole numbers with a unit, such as 90s, 12h or 14d, at most 90d")]
    Duration {
        /// The field.
        field: &'static str,
        /// Its value.
        text: String,
    },
    /// The test would end before it may have a verdict.
    #[error("spec.stopWhen.minDuration is not below spec.stopWhen.maxDuration; make it shorter")]
    MinDuration,
    /// The weights do not sum to 100.
    #[error("spec.variants: the weights sum to {sum}; change them so that they sum to 100")]
    Weights {
        /// Their sum.
        sum: u32,
    },
    /// Two variants are the same.
    #[error(
        "spec.variants: {one} and {other} are the same model, so the test compares it with itself; name another model, or a revision"
    )]
    SameVariant {
        /// One.
        one: String,
        /// The other.
        other: String,
    },
    /// A forced user's variant is none of the test.
    #[error(
        "spec.assignment.forced: the variant {variant} of user {user} does not exist; use one of {names}"
    )]
    ForcedVariant {
        /// The user.
        user: String,
        /// The variant.
        variant: String,
        /// The variants.
        names: String,
    },
    /// The field needs users.
    #[error("spec.assignment.{field} needs spec.assignment.by: User")]
    WithoutUsers {
        /// The field.
        field: &'static str,
    },
    /// Baseline and ramp.
    #[error("spec.baseline and spec.ramp exclude each other; remove one")]
    BaselineWithRamp,
    /// The shadow's variant is none of the test.
    #[error("spec.shadow.variant: the variant {variant} does not exist; use one of {names}")]
    ShadowVariant {
        /// The variant.
        variant: String,
        /// The variants.
        names: String,
    },
    /// A layer's part is empty.
    #[error("spec.assignment.layer: from {from} is not below to {to}")]
    EmptyLayer {
        /// Its begin.
        from: u32,
        /// Its end.
        to: u32,
    },
    /// A metric needs the cost of each variant.
    #[error(
        "spec.variants: {variant} has no cost, which the metric costPerRequest needs; add variants[].cost"
    )]
    NoCost {
        /// The variant.
        variant: String,
    },
    /// The metric stands twice.
    #[error("spec.secondary: {metric:?} is the goal already; remove it")]
    GoalTwice {
        /// The metric.
        metric: Metric,
    },
    /// A limit is no number that can be compared.
    #[error(
        "spec.guardrails: the limit of {metric:?} must be above 0 for a latency, and set exactly one of max and min"
    )]
    Limit {
        /// The metric.
        metric: Metric,
    },
}

/// Reads the spec of a test.
///
/// # Errors
/// Names the field that cannot be honoured, and what to write instead.
pub fn validate(test: &ABTest) -> Result<ValidatedTest, TestSpecError> {
    let meta = &test.metadata;
    let (Some(namespace), Some(name), Some(uid)) = (&meta.namespace, &meta.name, &meta.uid) else {
        return Err(TestSpecError::Incomplete);
    };
    let spec = &test.spec;
    let stop = &spec.stop_when;
    let min_duration = parse("spec.stopWhen.minDuration", &stop.min_duration)?;
    let max_duration = parse("spec.stopWhen.maxDuration", &stop.max_duration)?;
    if min_duration >= max_duration {
        return Err(TestSpecError::MinDuration);
    }
    let step = |step: &RampStep| -> Result<_, TestSpecError> {
        Ok(ValidatedRampStep { percent: step.percent, hold: parse("spec.ramp[].hold", &step.hold)? })
    };
    let ramp = spec.ramp.iter().map(step).collect::<Result<_, TestSpecError>>()?;
    let baseline = spec.baseline.as_ref().map(|text| parse("spec.baseline", text)).transpose()?;
    if baseline.is_some() && !spec.ramp.is_empty() {
        return Err(TestSpecError::BaselineWithRamp);
    }
    let variants: Vec<ValidatedVariant> = spec
        .variants
        .iter()
        .map(|variant| ValidatedVariant {
            name: variant.name.clone(),
            model: variant.model_ref.name.clone(),
            revision: variant.model_ref.revision.clone(),
            weight: variant.weight,
            cost: variant.cost,
        })
        .collect();
    check_variants(&variants)?;
    check_assignment(&spec.assignment)?;
    check_forced(&spec.assignment, &variants)?;
    check_shadow(spec.shadow.as_ref(), &variants)?;
    check_metrics(test)?;
    Ok(ValidatedTest {
        key: (namespace.clone(), name.clone()),
        uid: uid.clone(),
        generation: meta.generation.unwrap_or(0),
        created: meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        route: spec.route.clone(),
        samples_of: samples_of(test),
        variants,
        assignment: spec.assignment.clone(),
        baseline,
        ramp,
        goal: spec.goal.clone(),
        secondary: spec.secondary.clone(),
        guardrails: spec.guardrails.clone(),
        alpha: 1.0 - stop.confidence,
        min_samples: u64::from(stop.min_samples_per_variant),
        min_duration,
        max_duration,
        on_conclusion: spec.on_conclusion,
        promote_hold: parse("spec.promoteHold", &spec.promote_hold)?,
        // A spec that was decoded can be written.
        spec: serde_json::to_string(spec).unwrap_or_default(),
    })
}

fn check_shadow(shadow: Option<&TestShadow>, variants: &[ValidatedVariant]) -> Result<(), TestSpecError> {
    let Some(TestShadow { variant, .. }) = shadow else { return Ok(()) };
    if variants.iter().any(|one| one.name == *variant) {
        return Ok(());
    }
    let names: Vec<&str> = variants.iter().map(|one| one.name.as_str()).collect();
    Err(TestSpecError::ShadowVariant { variant: variant.clone(), names: names.join(", ") })
}

fn check_assignment(assignment: &Assignment) -> Result<(), TestSpecError> {
    let Assignment { by, jwt_claim, layer, holdout_percent, forced, .. } = assignment;
    let fields = [
        ("jwtClaim", jwt_claim.is_some()),
        ("layer", layer.is_some()),
        ("holdoutPercent", *holdout_percent > 0),
        ("forced", !forced.is_empty()),
    ];
    if *by != AssignBy::User
        && let Some((field, _)) = fields.into_iter().find(|(_, is_set)| *is_set)
    {
        return Err(TestSpecError::WithoutUsers { field });
    }
    match layer {
        Some(Layer { from, to, .. }) if from >= to => Err(TestSpecError::EmptyLayer { from: *from, to: *to }),
        _ => Ok(()),
    }
}

fn check_variants(variants: &[ValidatedVariant]) -> Result<(), TestSpecError> {
    let sum = variants.iter().map(|variant| variant.weight).sum();
    if sum != 100 {
        return Err(TestSpecError::Weights { sum });
    }
    for (index, one) in variants.iter().enumerate() {
        let same = variants[..index].iter().find(|other| {
            let any = one.revision.is_none() || other.revision.is_none();
            other.model == one.model && (any || other.revision == one.revision)
        });
        if let Some(other) = same {
            return Err(TestSpecError::SameVariant { one: other.name.clone(), other: one.name.clone() });
        }
    }
    Ok(())
}

fn check_forced(assignment: &Assignment, variants: &[ValidatedVariant]) -> Result<(), TestSpecError> {
    let names: BTreeSet<&str> = variants.iter().map(|variant| variant.name.as_str()).collect();
    match assignment.forced.iter().find(|forced| !names.contains(forced.variant.as_str())) {
        Some(forced) => Err(TestSpecError::ForcedVariant {
            user: forced.user.clone(),
            variant: forced.variant.clone(),
            names: names.into_iter().collect::<Vec<_>>().join(", "),
        }),
        None => Ok(()),
    }
}

fn check_metrics(test: &ABTest) -> Result<(), TestSpecError> {
    let goal = test.spec.goal.metric;
    if test.spec.secondary.iter().any(|one| one.metric == goal) {
        return Err(TestSpecError::GoalTwice { metric: goal });
    }
    let mut named = std::iter::once(goal)
        .chain(test.spec.secondary.iter().map(|one| one.metric))
        .chain(test.spec.guardrails.iter().map(|one| one.metric));
    let without_cost = test.spec.variants.iter().find(|variant| variant.cost.is_none());
    if named.any(|metric| metric == Metric::CostPerRequest)
        && let Some(variant) = without_cost
    {
        return Err(TestSpecError::NoCost { variant: variant.name.clone() });
    }
    for guardrail in &test.spec.guardrails {
        let ((Some(limit), None) | (None, Some(limit))) = (guardrail.max, guardrail.min) else {
            return Err(TestSpecError::Limit { metric: guardrail.metric });
        };
        let is_latency = super::metric::quantile_of(guardrail.metric).is_some();
        if !limit.is_finite() || (is_latency && (limit <= 0.0 || guardrail.max.is_none())) {
            return Err(TestSpecError::Limit { metric: guardrail.metric });
        }
    }
    Ok(())
}

/// Hash over text that is written here, so that a new version of a serialiser restarts no samples.
fn samples_of(test: &ABTest) -> String {
    let spec = &test.spec;
    let mut text = format!("{}\n{:?}\n{}\n", spec.route, spec.assignment.by, spec.assignment.header);
    for variant in &spec.variants {
        let revision = variant.model_ref.revision.as_deref().unwrap_or_default();
        text += &format!("{}\n{}\n{revision}\n", variant.name, variant.model_ref.name);
    }
    // Only what is set, so that tests of older versions keep their samples.
    if let Some(claim) = &spec.assignment.jwt_claim {
        text += &format!("claim {claim}\n");
    }
    if let Some(Layer { name, from, to }) = &spec.assignment.layer {
        text += &format!("layer {name} {from} {to}\n");
    }
    if spec.assignment.holdout_percent > 0 {
        text += &format!("holdout {}\n", spec.assignment.holdout_percent);
    }
    if let Some(baseline) = &spec.baseline {
        text += &format!("baseline {baseline}\n");
    }
    let goal = &spec.goal;
    text += &format!(
        "{:?}\n{:?}\n{}\n{}\n",
        goal.metric, goal.direction, goal.feedback_metric, goal.smallest_effect
    );
    hash::short(&text)
}

/// Reads a duration of a test, which may have days.
fn parse(field: &'static str, text: &str) -> Result<Duration, TestSpecError> {
    let wrong = || TestSpecError::Duration { field, text: text.to_owned() };
    let (days, rest) = text.split_once('d').unwrap_or(("0", text));
    let days: u32 = days.parse().map_err(|_| wrong())?;
    let rest = if rest.is_empty() { Duration::ZERO } else { duration::parse(rest).map_err(|_| wrong())? };
    let whole = Duration::from_secs(u64::from(days) * 24 * 3600) + rest;
    if text.is_empty() || whole > LONGEST { Err(wrong()) } else { Ok(whole) }
}

/// What a test needs that other objects do not leave it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
pub enum TestConflict {
    /// A model has the route's name.
    #[error(
        "spec.route: {route} is an InferenceModel of this namespace, which has the route; choose another name"
    )]
    RouteIsModel {
        /// The name.
        route: String,
    },
    /// An older test has the route.
    #[error(
        "spec.route: the older test {other} has the route {route}; choose another name, or delete that test"
    )]
    RouteInUse {
        /// The name.
        route: String,
        /// The other test.
        other: String,
    },
    /// An older test has some of the layer's users.
    #[error(
        "spec.assignment.layer: the older test {other} has users of this part of the layer {layer}; choose a part that no test has"
    )]
    LayerInUse {
        /// The layer.
        layer: String,
        /// The other test.
        other: String,
    },
    /// A model does not exist.
    #[error(
        "spec.variants: {variant} needs the InferenceModel {model}, which does not exist in this namespace; create it, or name another one"
    )]
    NoModel {
        /// The variant.
        variant: String,
        /// The model.
        model: String,
    },
}

/// A route that another test wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteClaim {
    /// Namespace and name of the test.
    pub key: ModelKey,
    /// When it was created.
    pub created: Timestamp,
    /// The route.
    pub route: String,
    /// Its part of a layer.
    pub layer: Option<Layer>,
}

impl RouteClaim {
    /// What a stored test wants; none without a name.
    #[must_use]
    pub fn of(test: &ABTest) -> Option<Self> {
        let running = test.status.as_ref().and_then(|status| running_test(test, status));
        let test = running.as_ref().unwrap_or(test);
        let meta = &test.metadata;
        Some(Self {
            key: (meta.namespace.clone()?, meta.name.clone()?),
            created: meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            route: test.spec.route.clone(),
            layer: test.spec.assignment.layer.clone(),
        })
    }
}

/// What keeps a test from its route: `models` are the names of the namespace's models, `claims` what all
/// tests want.
#[must_use]
pub fn conflict(
    test: &ValidatedTest,
    models: &BTreeSet<String>,
    claims: &[RouteClaim],
) -> Option<TestConflict> {
    let route = || test.route.clone();
    if models.contains(&test.route) {
        return Some(TestConflict::RouteIsModel { route: route() });
    }
    let missing = test.variants.iter().find(|variant| !models.contains(&variant.model));
    if let Some(variant) = missing {
        let (variant, model) = (variant.name.clone(), variant.model.clone());
        return Some(TestConflict::NoModel { variant, model });
    }
    let older = claims
        .iter()
        .filter(|claim| claim.key.0 == test.key.0 && (claim.created, &claim.key) < (test.created, &test.key));
    let of_route = older.clone().find(|claim| claim.route == test.route);
    if let Some(claim) = of_route {
        return Some(TestConflict::RouteInUse { route: route(), other: claim.key.1.clone() });
    }
    let layer = test.assignment.layer.as_ref()?;
    let overlaps = |other: &Layer| other.name == layer.name && other.from < layer.to && layer.from < other.to;
    let of_layer = older.clone().find(|claim| claim.layer.as_ref().is_some_and(overlaps));
    of_layer.map(|claim| TestConflict::LayerInUse { layer: layer.name.clone(), other: claim.key.1.clone() })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A test with this spec.
    pub(crate) fn stored(spec: &str) -> ABTest {
        let text = format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: ABTest\n\
             metadata: {{name: t, namespace: team, uid: u1, generation: 1, creationTimestamp: '2026-01-01T00:00:00Z'}}\n\
             spec: {spec}\n"
        );
        serde_yaml::from_str(&text).unwrap()
    }

    /// A spec with two variants, and more fields.
    pub(crate) fn spec(more: &str) -> String {
        format!(
            "{{route: chat, variants: [{{name: control, modelRef: {{name: a}}, weight: 90}}, \
             {{name: treatment, modelRef: {{name: b}}, weight: 10}}], \
             goal: {{metric: errorRate, direction: Lower}}{more}}}"
        )
    }

    #[test]
    fn a_spec_is_read_with_its_durations() {
        let more = ", ramp: [{percent: 10, hold: 1h}], stopWhen: {minDuration: 1d12h, maxDuration: 30d}";
        let test = validate(&stored(&spec(more))).unwrap();
        assert_eq!(test.min_duration, Duration::from_secs(36 * 3600));
        assert_eq!(test.max_duration, Duration::from_secs(30 * 24 * 3600));
        assert_eq!(test.ramp, [ValidatedRampStep { percent: 10, hold: Duration::from_secs(3600) }]);
        assert!((test.alpha - 0.05).abs() < 1e-12);
    }

    #[test]
    fn mistakes_name_the_field_and_the_remedy() {
        for (spec, expected) in [
            (spec(", stopWhen: {maxDuration: 91d}"), "spec.stopWhen.maxDuration"),
            (spec(", stopWhen: {minDuration: 14d}"), "make it shorter"),
            (spec("").replace("weight: 10", "weight: 20"), "sum to 110"),
            (spec("").replace("name: b", "name: a"), "control and treatment are the same model"),
            (spec(", assignment: {forced: [{user: u, variant: x}]}"), "use one of control, treatment"),
            (spec(", assignment: {by: Request, forced: [{user: u, variant: control}]}"), "by: User"),
            (spec(", secondary: [{metric: errorRate, direction: Lower}]"), "is the goal already"),
            (spec(", guardrails: [{metric: latencyP95Ms, max: -1}]"), "above 0"),
            (spec(", guardrails: [{metric: latencyP95Ms, min: 5}]"), "above 0"),
            (spec(", guardrails: [{metric: errorRate}]"), "exactly one of max and min"),
            (spec(", shadow: {variant: x, percent: 1}"), "use one of control, treatment"),
            (spec(", baseline: 1d, ramp: [{percent: 10, hold: 1h}]"), "exclude each other"),
            (spec(", guardrails: [{metric: costPerRequest, max: 1}]"), "control has no cost"),
            (spec(", assignment: {by: Request, jwtClaim: sub}"), "jwtClaim needs spec.assignment.by: User"),
            (spec(", assignment: {layer: {name: l, from: 50, to: 50}}"), "from 50 is not below to 50"),
        ] {
            let error = validate(&stored(&spec)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn revisions_of_one_model_are_different_variants() {
        let revisions = spec("")
            .replace("{name: a}", "{name: a, revision: r1}")
            .replace("{name: b}", "{name: a, revision: r2}");
        assert!(validate(&stored(&revisions)).is_ok());
        let any = revisions.replace(", revision: r2", "");
        assert!(matches!(validate(&stored(&any)), Err(TestSpecError::SameVariant { .. })));
    }

    #[test]
    fn weights_and_ramp_keep_the_samples_and_a_goal_does_not() {
        let of = |spec: &str| validate(&stored(spec)).unwrap().samples_of;
        let base = of(&spec(""));
        let weights = spec("").replace("weight: 90", "weight: 50").replace("weight: 10", "weight: 50");
        assert_eq!(of(&weights), base);
        assert_eq!(of(&spec(", ramp: [{percent: 10, hold: 1h}]")), base);
        assert_ne!(of(&spec("").replace("errorRate", "tokensPerSecond")), base);
        assert_ne!(of(&spec("").replace("name: b", "name: c")), base);
    }

    #[test]
    fn tests_of_one_layer_share_no_users() {
        let of = |from: u32, to: u32| {
            let more = format!(", assignment: {{layer: {{name: ranking, from: {from}, to: {to}}}}}");
            validate(&stored(&spec(&more))).unwrap()
        };
        let models: BTreeSet<String> = ["a", "b"].map(str::to_owned).into();
        let older = RouteClaim {
            key: ("team".to_owned(), "older".to_owned()),
            created: Timestamp::from_second(1).unwrap(),
            route: "other".to_owned(),
            layer: Some(Layer { name: "ranking".to_owned(), from: 0, to: 50 }),
        };
        let claims = [older];
        assert_eq!(conflict(&of(50, 100), &models, &claims), None);
        let taken = conflict(&of(49, 100), &models, &claims).unwrap();
        assert!(matches!(taken, TestConflict::LayerInUse { .. }), "{taken}");
    }

    #[test]
    fn conflicts_with_models_and_older_tests_are_found() {
        let test = validate(&stored(&spec(""))).unwrap();
        let models = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let claim = |name: &str, second: i64| RouteClaim {
            key: ("team".to_owned(), name.to_owned()),
            created: Timestamp::from_second(second).unwrap(),
            route: "chat".to_owned(),
            layer: None,
        };
        assert_eq!(conflict(&test, &models(&["a", "b"]), &[]), None);
        let own = RouteClaim::of(&stored(&spec(""))).unwrap();
        assert_eq!(conflict(&test, &models(&["a", "b"]), &[own, claim("younger", 1_900_000_000)]), None);
        let taken = conflict(&test, &models(&["a", "b"]), &[claim("older", 1)]).unwrap();
        assert!(taken.to_string().contains("older test older"), "{taken}");
        let missing = conflict(&test, &models(&["a"]), &[]).unwrap();
        assert!(missing.to_string().contains("treatment needs the InferenceModel b"), "{missing}");
        let shadowed = conflict(&test, &models(&["a", "b", "chat"]), &[]).unwrap();
        assert!(matches!(shadowed, TestConflict::RouteIsModel { .. }));
    }
}
