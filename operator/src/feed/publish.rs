//! Publishes a new table when its inputs change.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use trustformers_control::pods::PodView;
use trustformers_control::routes::{Loaded, RouteModel, routes};
use trustformers_proto::control::v1::Route;

use super::FeedState;
use crate::context::Context;

/// Changes within this time make one table. Together with the delay of the watch, a change reaches the
/// gateways in well below 100 ms.
const DEBOUNCE: Duration = Duration::from_millis(25);

/// Publishes tables without end. The caches are complete when it starts, so the first table is complete.
pub async fn run(context: Arc<Context>, feed: Arc<FeedState>) {
    let mut published: Option<Vec<Route>> = None;
    loop {
        let table = table(&context);
        if published.as_ref() != Some(&table) {
            let endpoints: usize =
                table.iter().flat_map(|route| &route.backends).map(|backend| backend.endpoints.len()).sum();
            context.metrics.routes.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
            context.metrics.endpoints.set(i64::try_from(endpoints).unwrap_or(i64::MAX));
            context.metrics.tables.inc();
            tracing::debug!(routes = table.len(), endpoints, "new route table");
            feed.publish(table.clone());
            published = Some(table);
            context.gates_changed.notify_one();
        }
        context.routes_changed.notified().await;
        sleep(DEBOUNCE).await;
    }
}

fn table(context: &Context) -> Vec<Route> {
    let mut models: Vec<RouteModel> =
        context.models.state().iter().filter_map(|model| RouteModel::of(model)).collect();
    // A model that cannot be decoded keeps the route of its last version that could, or gets one with
    // defaults.
    for unreadable in context.unreadable().into_values() {
        let route = RouteModel::of_unreadable(&unreadable.metadata);
        models.extend(route.filter(|route| models.iter().all(|model| model.key != route.key)));
    }
    let pods: Vec<PodView> = context.pods.state().iter().filter_map(|pod| PodView::of(pod)).collect();
    let reports = context.reports_of(&pods).into_iter();
    let loaded = reports
        .filter(|(_, report)| !report.model.digest.is_empty())
        .map(|(uid, report)| (uid, Loaded { digest: report.model.digest, task: report.model.task }))
        .collect();
    routes(&models, &pods, &loaded)
}
