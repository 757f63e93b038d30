//! The server inside a program of your own: `cargo run --release --example course-09-library MODEL.gguf`

use std::error::Error;

use trustformers_serve::proto::{GenerateRequest, inference_service_client::InferenceServiceClient};
use trustformers_serve::{Config, TrustformersServer};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("name a .gguf file")?;
    println!("{}", serve_and_ask(&path).await?);
    Ok(())
}

/// Serves the model on free ports, asks it, and ends.
pub(crate) async fn serve_and_ask(path: &str) -> Result<String, Box<dyn Error>> {
    let mut config = Config::default();
    config.server.host = std::net::Ipv4Addr::LOCALHOST.into();
    config.server.port = 0;
    config.server.grpc_port = 0;
    let mut server = TrustformersServer::new(config);
    server.load_model("mine", path)?;

    let running = server.start().await?;
    running.until_ready().await;
    let address = format!("http://{}", running.grpc_address());
    let request =
        GenerateRequest { prompt: "Water boils at".to_owned(), max_tokens: 8, ..Default::default() };
    let answer = InferenceServiceClient::connect(address).await?.generate(request).await?.into_inner();

    // While it runs, models come and go.
    running.load_model("second", path).await?;
    running.unload_model("mine").await?;
    running.drain().await;
    Ok(answer.text)
}
