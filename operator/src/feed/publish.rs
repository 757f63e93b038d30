//! Publishes a new table when its inputs change.
//!
//! The table is kept by route: a change costs what its model costs, and the table is sent with all changes of
//! a short time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use trustformers_control::ab_test::assign::{RoutedTest, with_tests};
use trustformers_control::pods::PodView;
use trustformers_control::routes::{Loaded, ModelKey, RouteModel, route};
use trustformers_proto::control::v1::Route;

use super::FeedState;
use crate::changes::Marked;
use crate::context::{Context, Unreadable};
use crate::models::oldest;
use crate::reconcile::fetch;

/// Changes within this time make one table. Together with the delay of the watch, a change reaches the
/// gateways in well below 100 ms.
const DEBOUNCE: Duration = Duration::from_millis(25);
/// While changes go on, a large table is made less often, so that making it takes at most one part in this
/// many of the time. A change after a time without any does not wait for that.
const LOAD: u32 = 200;
/// Longest time between a change and its table.
const LONGEST_DEBOUNCE: Duration = Duration::from_millis(500);

/// Publishes tables without end. The caches are complete when it starts, so the first table is complete.
pub async fn run(context: Arc<Context>, feed: Arc<FeedState>) {
    let mut table = Table::default();
    let mut published_tests: Option<Vec<RoutedTest>> = None;
    loop {
        let started = Instant::now();
        let changed = table.update(&context);
        let tests = routed_tests(&context);
        if changed || published_tests.as_ref() != Some(&tests) {
            let routes = with_tests(table.routes.values().cloned().collect(), &tests);
            let backends = routes.iter().flat_map(|route| &route.backends);
            let endpoints: usize = backends.map(|backend| backend.endpoints.len()).sum();
            context.metrics.routes.set(i64::try_from(routes.len()).unwrap_or(i64::MAX));
            context.metrics.endpoints.set(i64::try_from(endpoints).unwrap_or(i64::MAX));
            context.metrics.tables.inc();
            tracing::debug!(routes = routes.len(), endpoints, "new route table");
            feed.publish(routes);
            published_tests = Some(tests);
            context.gates_changed.notify_one();
            context.ab_tests_changed.notify_one();
        }
        let took = started.elapsed();
        context.routes_changed.notified().await;
        sleep_until(next_table(started, took, Instant::now())).await;
    }
}

/// When to make the next table: the last one was begun at `started` and took this long, and now something has
/// changed.
fn next_table(started: Instant, took: Duration, now: Instant) -> Instant {
    (started + (took * LOAD).min(LONGEST_DEBOUNCE)).max(now + DEBOUNCE)
}

/// The tests that have a route, in the order of their names.
fn routed_tests(context: &Context) -> Vec<RoutedTest> {
    let mut tests = context.ab_tests.state();
    tests.sort_by(|one, other| {
        (&one.metadata.namespace, &one.metadata.name).cmp(&(&other.metadata.namespace, &other.metadata.name))
    });
    tests.iter().filter_map(|test| RoutedTest::of(test)).collect()
}

/// The route of one model, as the caches give it; none without the model.
pub(crate) fn model_route(context: &Context, key: &ModelKey) -> Option<Route> {
    route_of(context, &context.unreadable(), key)
}

/// The routes by name, which is also their order.
#[derive(Debug, Default)]
struct Table {
    routes: BTreeMap<String, Route>,
}

impl Table {
    /// Brings the routes of marked models up to date. True if any changed.
    fn update(&mut self, context: &Context) -> bool {
        let unreadable = context.unreadable();
        let mut changed = false;
        let keys: BTreeSet<ModelKey> = match context.routes_changed.drain() {
            Marked::Models(models) => models,
            Marked::All => {
                let stored = context.models.state();
                let stored = stored.iter().filter_map(|model| fetch::key(model));
                let all: BTreeSet<ModelKey> = stored.chain(unreadable.keys().cloned()).collect();
                let names: BTreeSet<String> = all.iter().map(full_name).collect();
                let before = self.routes.len();
                self.routes.retain(|name, _| names.contains(name));
                changed = self.routes.len() != before;
                all
            }
        };
        for key in &keys {
            changed |= self.update_model(context, &unreadable, key);
        }
        changed
    }

    fn update_model(
        &mut self,
        context: &Context,
        unreadable: &BTreeMap<ModelKey, Unreadable>,
        key: &ModelKey,
    ) -> bool {
        let name = full_name(key);
        let Some(route) = route_of(context, unreadable, key) else {
            return self.routes.remove(&name).is_some();
        };
        if self.routes.get(&name) == Some(&route) {
            return false;
        }
        self.routes.insert(name, route);
        true
    }
}

fn route_of(context: &Context, unreadable: &BTreeMap<ModelKey, Unreadable>, key: &ModelKey) -> Option<Route> {
    // A model that cannot be decoded keeps the route of its last version that could, or gets one with
    // defaults.
    let model = context.model(key).and_then(|model| RouteModel::of(&model));
    let model =
        model.or_else(|| unreadable.get(key).and_then(|one| RouteModel::of_unreadable(&one.metadata)))?;
    let pods = context.pods.of_model(key);
    let views: Vec<&PodView> = pods.iter().map(|pod| &pod.view).collect();
    let reports = views.iter().filter_map(|pod| Some((*pod, context.pods.report(pod)?.model)));
    let loaded = reports
        .filter(|(_, report)| !report.digest.is_empty())
        .map(|(pod, report)| (pod.uid.clone(), Loaded::of(pod, &report)))
        .collect();
    Some(route(&model, owns_name(context, unreadable, key), &views, &loaded))
}

fn full_name((namespace, name): &ModelKey) -> String {
    format!("{namespace}/{name}")
}

/// Whether a model owns its bare name. One that cannot be decoded counts too.
fn owns_name(context: &Context, unreadable: &BTreeMap<ModelKey, Unreadable>, key: &ModelKey) -> bool {
    let mut namesakes = context.names.namesakes(&key.1);
    for (other, model) in unreadable.iter().filter(|(other, _)| other.1 == key.1) {
        let created = model.metadata.creation_timestamp.as_ref().map(|time| time.0);
        namesakes.entry(other.clone()).or_insert(created);
    }
    oldest(&namesakes).as_ref() == Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_go_on_make_tables_for_one_part_in_200_of_the_time() {
        let started = Instant::now();
        let ms = Duration::from_millis;
        assert_eq!(next_table(started, ms(2), started + ms(10)), started + ms(400));
        assert_eq!(next_table(started, ms(40), started + ms(60)), started + LONGEST_DEBOUNCE);
        // A single change waits for the others of its instant alone.
        assert_eq!(next_table(started, ms(3), started + ms(5000)), started + ms(5000) + DEBOUNCE);
    }
}
