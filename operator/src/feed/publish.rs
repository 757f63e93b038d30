//! Makes a new table whenever what it is made of has changed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use trustformers_control::pods::PodView;
use trustformers_control::routes::{RouteModel, routes};
use trustformers_proto::control::v1::Route;

use super::Hub;
use crate::world::World;

/// Changes that come this close together make one table. With the watch's own delay this keeps a change well below
/// 100 ms from the gateways.
const DEBOUNCE: Duration = Duration::from_millis(25);

/// Publishes tables for ever. The caches are complete when it starts, so that its first table lacks nothing.
pub async fn run(world: Arc<World>, hub: Arc<Hub>) {
    let mut published: Option<Vec<Route>> = None;
    loop {
        let table = table(&world);
        if published.as_ref() != Some(&table) {
            let endpoints: usize =
                table.iter().flat_map(|route| &route.backends).map(|backend| backend.endpoints.len()).sum();
            world.metrics.routes.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
            world.metrics.endpoints.set(i64::try_from(endpoints).unwrap_or(i64::MAX));
            world.metrics.tables.inc();
            tracing::debug!(routes = table.len(), endpoints, "new route table");
            hub.publish(table.clone());
            published = Some(table);
            world.gates_changed.notify_one();
        }
        world.routes_changed.notified().await;
        sleep(DEBOUNCE).await;
    }
}

fn table(world: &World) -> Vec<Route> {
    let models: Vec<RouteModel> =
        world.caches.models.state().iter().filter_map(|model| RouteModel::of(model)).collect();
    let pods: Vec<PodView> = world.caches.pods.state().iter().filter_map(|pod| PodView::of(pod)).collect();
    routes(&models, &pods, &world.loaded())
}
