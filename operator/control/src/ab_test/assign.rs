//! Who gets which variant: shares over a ramp and a promotion, owners of users, and the routes of tests.
//!
//! Routes are made from what is stored: shares and owners are in the status before any gateway gets them, so
//! that another operator's table is the same.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{
    ABTest, ABTestSpec, ABTestStatus, AssignBy, Assignment, Layer, OwnerRange, TestShadow, Variant,
};
use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
use trustformers_proto::control::v1::{
    Backend, BucketRange, ForcedUser, Route, RouteTest, RouteVariant, Shadow, Split, SplitBy, UserRange,
};

use super::validate::ValidatedTest;
use crate::routes::ModelKey;
use crate::traffic::shadowed_by;

/// All of a route's requests. One unit is one bucket of users.
pub const WHOLE: u32 = 10_000;

/// The share of each variant in a step of the ramp, which has one step more than the spec: the weights
/// themselves.
#[must_use]
pub fn weights_at(test: &ValidatedTest, ramp_step: u32) -> Vec<u32> {
    let percent = test.ramp.get(ramp_step as usize).map_or(100, |step| step.percent);
    let behind = test.variants.iter().skip(1).map(|variant| variant.weight * percent);
    let behind: Vec<u32> = behind.collect();
    // The control gets what the others do not have yet.
    let control = WHOLE.saturating_sub(behind.iter().sum());
    std::iter::once(control).chain(behind).collect()
}

/// The shares while the variant `winner` is given `percent` of what the others have.
#[must_use]
pub fn promoted(weights: &[u32], winner: usize, percent: u32) -> Vec<u32> {
    let left = |weight: u32| weight * (100 - percent.min(100)) / 100;
    let others: u32 = weights
        .iter()
        .enumerate()
        .filter(|(index, _)| *index != winner)
        .map(|(_, weight)| left(*weight))
        .sum();
    let share = |(index, weight): (usize, &u32)| match index == winner {
        true => WHOLE.saturating_sub(others),
        false => left(*weight),
    };
    weights.iter().enumerate().map(share).collect()
}

/// The owners with these shares: no user moves who need not. Without earlier owners the first variant owns
/// the first buckets.
#[must_use]
pub fn owners(before: &[OwnerRange], names: &[String], weights: &[u32]) -> Vec<OwnerRange> {
    let shares: Vec<RevisionWeight> = names
        .iter()
        .zip(weights)
        .map(|(name, weight)| RevisionWeight { revision: name.clone(), weight: *weight })
        .collect();
    let ranges: Vec<BucketRange> = before.iter().map(range).collect();
    let before = BucketOwners::of_ranges(&ranges).ok();
    let after = match before {
        Some(before) => before.changed_to(&shares),
        None => BucketOwners::with_weights(&shares),
    };
    let ranges = after.map(|owners| owners.to_ranges()).unwrap_or_default();
    ranges.into_iter().map(|range| OwnerRange { end: range.end, variant: range.revision }).collect()
}

fn range(owner: &OwnerRange) -> BucketRange {
    BucketRange { end: owner.end, revision: owner.variant.clone() }
}

/// A test whose status gives it a route.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutedTest {
    /// Namespace of the test and its models.
    namespace: String,
    /// The name that callers use.
    route: String,
    created: Timestamp,
    uid: String,
    epoch: u64,
    variants: Vec<RoutedVariant>,
    assignment: Assignment,
    owners: Vec<OwnerRange>,
    feedback_metric: String,
    baseline: bool,
    shadow: Option<Shadow>,
}

#[derive(Debug, Clone, PartialEq)]
struct RoutedVariant {
    name: String,
    weight: u32,
    model: String,
    revision: Option<String>,
}

impl RoutedTest {
    /// Reads a stored test; none before it has started. A variant that the spec does not have any more keeps
    /// nothing: the next status divides its share.
    #[must_use]
    pub fn of(test: &ABTest) -> Option<Self> {
        let status = test.status.as_ref()?;
        let epoch = status.epochs.last()?;
        let running = running_test(test, status);
        let test = running.as_ref().unwrap_or(test);
        let of_spec = |name: &str| test.spec.variants.iter().find(|variant: &&Variant| variant.name == name);
        let variants = status.variants.iter().zip(&epoch.weights).filter_map(|(stored, weight)| {
            let variant = of_spec(&stored.name)?;
            Some(RoutedVariant {
                name: stored.name.clone(),
                weight: *weight,
                model: variant.model_ref.name.clone(),
                revision: variant.model_ref.revision.clone(),
            })
        });
        let variants: Vec<RoutedVariant> = variants.collect();
        if variants.is_empty() {
            return None;
        }
        Some(Self {
            namespace: test.metadata.namespace.clone()?,
            route: test.spec.route.clone(),
            created: test.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            uid: test.metadata.uid.clone()?,
            epoch: u64::try_from(epoch.epoch).unwrap_or(0),
            variants,
            assignment: test.spec.assignment.clone(),
            owners: status.owners.clone(),
            feedback_metric: test.spec.goal.feedback_metric.clone(),
            baseline: epoch.baseline,
            shadow: shadow(test),
        })
    }

    fn split(&self) -> Split {
        let Assignment { by, header, jwt_claim, forced, .. } = &self.assignment;
        let by_user = *by == AssignBy::User;
        let forced = forced.iter().filter(|_| by_user);
        let forced = forced.map(|one| ForcedUser { user: one.user.clone(), variant: one.variant.clone() });
        Split {
            by: match by {
                AssignBy::User => SplitBy::User,
                AssignBy::Request => SplitBy::Request,
                AssignBy::Percentage => SplitBy::Percentage,
            }
            .into(),
            user_header: if by_user { header.clone() } else { String::new() },
            salt: self.uid.clone(),
            owners: if by_user { self.owners.iter().map(range).collect() } else { Vec::new() },
            forced_users: forced.collect(),
            user_claim: jwt_claim.clone().filter(|_| by_user).unwrap_or_default(),
            excluded_users: if by_user { self.excluded_users() } else { Vec::new() },
            ..Split::default()
        }
    }

    /// The users outside the test: those of other parts of its layer, and those that are held out. Tests of a
    /// namespace hash them with the same salt.
    fn excluded_users(&self) -> Vec<UserRange> {
        const OF_PERCENT: u32 = WHOLE / 100;
        let mut excluded = Vec::new();
        if let Some(Layer { name, from, to }) = &self.assignment.layer {
            for (start, end) in [(0, from * OF_PERCENT), (to * OF_PERCENT, WHOLE)] {
                excluded.push(UserRange { salt: format!("layer/{}/{name}", self.namespace), start, end });
            }
        }
        let end = self.assignment.holdout_percent * OF_PERCENT;
        excluded.push(UserRange { salt: format!("holdout/{}", self.namespace), start: 0, end });
        excluded.retain(|range| range.start < range.end);
        excluded
    }
}

/// The requests that a variant of a test answers as well.
fn shadow(test: &ABTest) -> Option<Shadow> {
    let TestShadow { variant, percent, compare } = test.spec.shadow.as_ref()?;
    let variant = test.spec.variants.iter().find(|one| one.name == *variant)?;
    let namespace = test.metadata.namespace.as_deref()?;
    let shadow = shadowed_by(namespace, &variant.model_ref);
    Some(Shadow { percent: *percent, discard: !compare, variant: variant.name.clone(), ..shadow })
}

/// The test as it runs: with the last spec that could be honoured. None before it has begun.
#[must_use]
pub fn running_test(test: &ABTest, status: &ABTestStatus) -> Option<ABTest> {
    let accepted = status.accepted_spec.as_ref().filter(|_| !status.epochs.is_empty())?;
    let spec: ABTestSpec = serde_json::from_str(accepted).ok()?;
    Some(ABTest { spec, ..test.clone() })
}

/// The backends of a variant among those of its model, with the shares that they have there.
fn backends(variant: &RoutedVariant, model: &Route) -> Vec<Backend> {
    let wanted = |backend: &&Backend| variant.revision.as_ref().is_none_or(|one| *one == backend.revision);
    let only = variant.revision.is_some();
    let backend = |backend: &Backend| Backend {
        // Two models may have one revision.
        revision: format!("{}:{}", variant.name, backend.revision),
        variant: variant.name.clone(),
        weight: if only { backend.weight.max(1) } else { backend.weight },
        ..backend.clone()
    };
    model.backends.iter().filter(wanted).map(backend).collect()
}

/// What serves a variant now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServingVariant {
    /// Its revisions, joined; empty if none serves.
    pub revisions: String,
    /// Its pods.
    pub replicas: u32,
}

/// What serves a variant of this model now.
#[must_use]
pub fn serving_variant(
    namespace: &str,
    model: &str,
    revision: Option<&str>,
    routes: &[Route],
) -> ServingVariant {
    let name = format!("{namespace}/{model}");
    let route = routes.iter().find(|route| route.name == name);
    let backends = route.into_iter().flat_map(|route| &route.backends).filter(|backend| {
        let wanted = revision.map_or(backend.weight > 0, |revision| revision == backend.revision);
        wanted && !backend.endpoints.is_empty()
    });
    let backends: Vec<&Backend> = backends.collect();
    let revisions: BTreeSet<&str> = backends.iter().map(|backend| backend.revision.as_str()).collect();
    let replicas: usize = backends.iter().map(|backend| backend.endpoints.len()).sum();
    ServingVariant {
        revisions: revisions.into_iter().collect::<Vec<_>>().join("+"),
        replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
    }
}

/// The routes of models with those of tests: a name that a model or an older test has stays theirs.
#[must_use]
pub fn with_tests(mut routes: Vec<Route>, tests: &[RoutedTest]) -> Vec<Route> {
    let mut tests: Vec<&RoutedTest> = tests.iter().collect();
    tests.sort_by_key(|test| (test.created, &test.namespace, &test.uid));
    let mut names: BTreeSet<String> = routes
        .iter()
        .flat_map(|route| route.aliases.iter().cloned().chain(std::iter::once(route.name.clone())))
        .collect();
    let by_name: BTreeMap<String, Route> =
        routes.iter().map(|route| (route.name.clone(), route.clone())).collect();
    for test in tests {
        let full = format!("{}/{}", test.namespace, test.route);
        if !names.insert(full.clone()) {
            continue;
        }
        let model = |variant: &RoutedVariant| by_name.get(&format!("{}/{}", test.namespace, variant.model));
        let control = test.variants.first().and_then(model);
        let mut aliases = vec![full.clone()];
        if names.insert(test.route.clone()) {
            aliases.push(test.route.clone());
        }
        let all = test.variants.iter();
        routes.push(Route {
            name: full,
            aliases,
            backends: all
                .clone()
                .flat_map(|variant| model(variant).map_or_else(Vec::new, |model| backends(variant, model)))
                .collect(),
            policy: control.and_then(|model| model.policy.clone()),
            task: control.map(|model| model.task.clone()).unwrap_or_default(),
            split: Some(test.split()),
            test: Some(RouteTest {
                uid: test.uid.clone(),
                epoch: test.epoch,
                variants: all
                    .map(|variant| RouteVariant { name: variant.name.clone(), weight: variant.weight })
                    .collect(),
                feedback_metric: test.feedback_metric.clone(),
                baseline: test.baseline,
            }),
            shadow: test.shadow.clone(),
            ..Route::default()
        });
    }
    routes.sort_by(|one, other| one.name.cmp(&other.name));
    routes
}

/// Namespace and name of the models of a test: of its spec, and of the one that it runs by.
#[must_use]
pub fn models_of(test: &ABTest) -> Vec<ModelKey> {
    let running = test.status.as_ref().and_then(|status| running_test(test, status));
    let running = running.into_iter().flat_map(|test| test.spec.variants);
    let variants = test.spec.variants.iter().cloned().chain(running);
    let namespace = test.metadata.namespace.as_deref().unwrap_or_default();
    variants.map(|variant| (namespace.to_owned(), variant.model_ref.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::validate::tests::{spec, stored};
    use super::super::validate::validate;
    use super::*;
    use proptest::prelude::*;
    use trustformers_proto::control::v1::Endpoint;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn owner_of(owners: &[OwnerRange], bucket: u32) -> &str {
        &owners.iter().find(|range| bucket < range.end).unwrap().variant
    }

    #[test]
    fn the_ramp_takes_the_rest_from_the_control() {
        let more = ", ramp: [{percent: 10, hold: 1h}, {percent: 50, hold: 1h}]";
        let test = validate(&stored(&spec(more))).unwrap();
        assert_eq!(weights_at(&test, 0), [9900, 100]);
        assert_eq!(weights_at(&test, 1), [9500, 500]);
        assert_eq!(weights_at(&test, 2), [9000, 1000]);
        assert_eq!(weights_at(&test, 9), [9000, 1000]);
    }

    #[test]
    fn a_promotion_takes_from_the_others_alone() {
        assert_eq!(promoted(&[9000, 1000], 1, 50), [4500, 5500]);
        assert_eq!(promoted(&[9000, 1000], 1, 100), [0, 10_000]);
        assert_eq!(promoted(&[5000, 3000, 2000], 0, 50), [7500, 1500, 1000]);
        assert_eq!(promoted(&[9000, 1000], 0, 0), [9000, 1000]);
    }

    #[test]
    fn of_100_000_users_exactly_the_tenth_that_must_move_moves() {
        let both = names(&["control", "treatment"]);
        let before = owners(&[], &both, &[9000, 1000]);
        let after = owners(&before, &both, &[8000, 2000]);
        // User k of 100,000 has bucket k mod 10,000: ten users in each.
        let users = (0..100_000_u32).map(|user| user % WHOLE);
        let moves = users.filter(|bucket| owner_of(&before, *bucket) != owner_of(&after, *bucket));
        let moved: Vec<u32> = moves.collect();
        assert_eq!(moved.len(), 10_000);
        assert!(moved.iter().all(|bucket| owner_of(&after, *bucket) == "treatment"));
    }

    proptest! {
        #[test]
        fn a_change_moves_only_what_some_variant_has_too_much(
            shares in proptest::collection::vec(proptest::collection::vec(1_u32..100, 3), 1..6),
        ) {
            let all = names(&["a", "b", "c"]);
            let mut present = owners(&[], &all, &[1, 1, 1]);
            for weights in shares {
                let next = owners(&present, &all, &weights);
                let count = |owners: &[OwnerRange], name: &str| {
                    (0..WHOLE).filter(|bucket| owner_of(owners, *bucket) == name).count()
                };
                let surplus: usize = all
                    .iter()
                    .map(|name| count(&present, name).saturating_sub(count(&next, name)))
                    .sum();
                let moved =
                    (0..WHOLE).filter(|bucket| owner_of(&present, *bucket) != owner_of(&next, *bucket));
                prop_assert_eq!(moved.count(), surplus);
                present = next;
            }
        }
    }

    fn model(name: &str, backends: &[(&str, u32)]) -> Route {
        let backend = |&(revision, weight): &(&str, u32)| Backend {
            revision: revision.to_owned(),
            weight,
            endpoints: vec![Endpoint { pod_name: format!("{name}-pod"), ..Endpoint::default() }],
            ..Backend::default()
        };
        Route {
            name: format!("team/{name}"),
            aliases: vec![format!("team/{name}"), name.to_owned()],
            backends: backends.iter().map(backend).collect(),
            task: "generate".to_owned(),
            ..Route::default()
        }
    }

    fn routed(spec: &str, weights: &str) -> RoutedTest {
        let mut test = stored(spec);
        let status = format!(
            "{{epochs: [{{epoch: 7, since: '2026-01-01T00:00:00Z', weights: {weights}}}], \
             owners: [{{end: 9000, variant: control}}, {{end: 10000, variant: treatment}}], \
             variants: [{{name: control}}, {{name: treatment}}]}}"
        );
        test.status = Some(serde_yaml::from_str(&status).unwrap());
        RoutedTest::of(&test).unwrap()
    }

    #[test]
    fn the_route_of_a_test_has_the_backends_of_its_models() {
        let models = vec![model("a", &[("r1", 3)]), model("b", &[("r1", 7), ("r2", 0)])];
        let test = routed(&spec(", assignment: {forced: [{user: qa, variant: treatment}]}"), "[9000, 1000]");
        let routes = with_tests(models, &[test]);
        let route = routes.iter().find(|route| route.name == "team/chat").unwrap();
        assert_eq!(route.aliases, ["team/chat", "chat"]);
        let backends: Vec<_> = route
            .backends
            .iter()
            .map(|one| (one.revision.as_str(), one.variant.as_str(), one.weight))
            .collect();
        assert_eq!(
            backends,
            [
                ("control:r1", "control", 3),
                ("treatment:r1", "treatment", 7),
                ("treatment:r2", "treatment", 0)
            ]
        );
        let split = route.split.as_ref().unwrap();
        assert_eq!((split.by(), split.salt.as_str(), split.owners.len()), (SplitBy::User, "u1", 2));
        assert_eq!(split.forced_users[0].variant, "treatment");
        let test = route.test.as_ref().unwrap();
        let weights: Vec<u32> = test.variants.iter().map(|variant| variant.weight).collect();
        assert_eq!((test.epoch, weights), (7, vec![9000, 1000]));
    }

    #[test]
    fn users_of_other_layers_and_held_out_users_are_outside() {
        let more =
            ", assignment: {jwtClaim: sub, layer: {name: ranking, from: 20, to: 60}, holdoutPercent: 5}";
        let split = routed(&spec(more), "[9000, 1000]").split();
        let ranges: Vec<_> =
            split.excluded_users.iter().map(|one| (one.salt.as_str(), one.start, one.end)).collect();
        assert_eq!(
            ranges,
            [("layer/team/ranking", 0, 2000), ("layer/team/ranking", 6000, 10_000), ("holdout/team", 0, 500)]
        );
        assert_eq!(split.user_claim, "sub");
        assert!(routed(&spec(""), "[9000, 1000]").split().excluded_users.is_empty());
    }

    #[test]
    fn a_shadow_is_the_model_of_its_variant() {
        let more = ", shadow: {variant: treatment, percent: 10, compare: false}";
        let routes = with_tests(vec![model("a", &[("r1", 1)])], &[routed(&spec(more), "[9000, 1000]")]);
        let shadow = routes.iter().find_map(|route| route.shadow.clone()).unwrap();
        assert_eq!((shadow.route.as_str(), shadow.percent, shadow.discard), ("team/b", 10, true));
        assert_eq!(shadow.variant, "treatment", "its counts are reported with those of the variant");
    }

    #[test]
    fn a_route_follows_the_spec_that_the_test_runs_by() {
        let mut test = stored(&spec(""));
        let accepted = serde_json::to_string(&test.spec).unwrap();
        let status = format!(
            "{{epochs: [{{epoch: 7, since: '2026-01-01T00:00:00Z', weights: [9000, 1000]}}], \
             variants: [{{name: control}}, {{name: treatment}}], acceptedSpec: '{accepted}'}}"
        );
        test.status = Some(serde_yaml::from_str(&status).unwrap());
        test.spec.variants[1].name = "other".to_owned();
        test.spec.variants[1].model_ref.name = "z".to_owned();
        let routes = with_tests(
            vec![model("a", &[("r1", 1)]), model("b", &[("r1", 1)])],
            &[RoutedTest::of(&test).unwrap()],
        );
        let route = routes.iter().find(|route| route.test.is_some()).unwrap();
        assert_eq!(route.backends.len(), 2, "the treatment's pods stay");
        let names: Vec<_> = models_of(&test).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["a", "z", "a", "b"]);
    }

    #[test]
    fn a_name_of_a_model_or_of_an_older_test_stays_theirs() {
        let test = routed(&spec(""), "[9000, 1000]");
        let younger = RoutedTest { uid: "u2".to_owned(), created: Timestamp::MAX, ..test.clone() };
        let routes = with_tests(vec![model("a", &[]), model("b", &[])], &[younger, test.clone()]);
        let tests: Vec<_> = routes.iter().filter_map(|route| route.test.as_ref()).collect();
        assert_eq!((tests.len(), tests[0].uid.as_str()), (1, "u1"));
        assert_eq!(with_tests(vec![model("chat", &[])], &[test]).len(), 1);
    }

    #[test]
    fn a_revision_of_a_variant_may_have_no_share_of_its_model() {
        let held = spec("").replace("{name: b}", "{name: b, revision: r2}");
        let models = vec![model("a", &[("r1", 1)]), model("b", &[("r1", 10), ("r2", 0)])];
        let serving = |model: &str, revision| serving_variant("team", model, revision, &models);
        assert_eq!(serving("b", Some("r2")), ServingVariant { revisions: "r2".to_owned(), replicas: 1 });
        assert_eq!(serving("b", None).revisions, "r1");
        assert_eq!(serving("c", None), ServingVariant::default());
        let routes = with_tests(models, &[routed(&held, "[9000, 1000]")]);
        let route = routes.iter().find(|route| route.test.is_some()).unwrap();
        let treatment = route.backends.iter().find(|one| one.variant == "treatment").unwrap();
        assert_eq!((treatment.revision.as_str(), treatment.weight), ("treatment:r2", 1));
    }
}
