//! The HTTP side: OpenAI's interface over the [engine](super::engine).

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod scores;
mod tokens;
mod wanted;

use std::future::Future;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::future::{Either, select};
use serde_json::{Value, json};

use super::job::Handle;
use crate::device::sampler::SamplerConfig;
use crate::model::chat::Chat;
use crate::model::tokenizer::Tokenizer;
pub use error::ApiError;

/// Threads that parse requests, turn text into tokens and write answers; the engine has its own.
const HTTP_THREADS: usize = 2;
/// After everything has been cut, answers get so long to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is served, and to whom.
#[derive(Debug)]
pub struct Server {
    /// The engine.
    pub handle: Handle,
    /// Name of the model.
    pub name: String,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// The model's tokenizer, where it has one.
    pub text: Option<Tokenizer>,
    /// Its chat template, where it has one.
    pub chat: Option<Chat>,
    /// The model's own settings, which requests change.
    pub sampler: SamplerConfig,
    /// New tokens where a request does not say how many.
    pub max_new: Option<usize>,
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// The key that requests must have, where there is one.
    pub api_key: Option<String>,
    /// Largest body of a request, in bytes.
    pub largest_body: usize,
}

/// Serves until `stop` is ready. Then no request is accepted any more, and those that are there get `grace` to end.
///
/// # Errors
/// What the operating system says.
pub fn serve(
    server: Server,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
    grace: Duration,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .thread_name("http")
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let server = Arc::new(server);
        let (stopping, stopped) = tokio::sync::oneshot::channel();
        let signal = async move {
            stop.await;
            // Where nobody waits for it, the server has ended.
            let _ = stopping.send(());
        };
        let served = axum::serve(listener, router(server.clone())).with_graceful_shutdown(signal);
        let late = async {
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(grace).await;
            server.handle.cut();
            tokio::time::sleep(LAST_WORDS).await;
        };
        match select(Box::pin(served.into_future()), Box::pin(late)).await {
            Either::Left((served, _)) => served,
            Either::Right(_) => Ok(()),
        }
    });
    runtime.shutdown_timeout(LAST_WORDS);
    served
}

fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(async || ApiError::of(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            ApiError::of(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path has another method",
            )
        })
        .layer(DefaultBodyLimit::max(server.largest_body))
        .layer(from_fn_with_state(server.clone(), admit))
        .with_state(server)
}

/// Asks for the key, and counts the answers.
async fn admit(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let answer = match server.admits(&request) {
        true => next.run(request).await,
        false => {
            let message = "expected the server's key as `Authorization: Bearer KEY`";
            ApiError::of(StatusCode::UNAUTHORIZED, message).into_response()
        }
    };
    let class = match answer.status().as_u16() {
        ..400 => 0,
        400..500 => 1,
        _ => 2,
    };
    server.handle.shared.metrics.answers[class].fetch_add(1, Ordering::Relaxed);
    answer
}

async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    match server.handle.alive() {
        true => Ok(Json(json!({"status": "ok"}))),
        false => Err(super::job::Refused::Stopping.into()),
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let kind = (header::CONTENT_TYPE, "text/plain; version=0.0.4");
    ([kind], server.handle.shared.metrics.text()).into_response()
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [server.about()]}))
}

async fn model(
    State(server): State<Arc<Server>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    match name == server.name {
        true => Ok(Json(server.about())),
        false => Err(ApiError::unknown_model(&server.name, &name)),
    }
}

impl Server {
    fn about(&self) -> Value {
        json!({
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "segattn",
            "max_model_len": self.handle.shared.limits.longest,
        })
    }

    fn admits(&self, request: &Request) -> bool {
        let Some(key) = &self.api_key else {
            return true;
        };
        if request.uri().path() == "/health" {
            return true;
        }
        let given = request.headers().get(header::AUTHORIZATION);
        let given = given.and_then(|given| given.as_bytes().strip_prefix(b"Bearer "));
        given.is_some_and(|given| equal(given, key.as_bytes()))
    }

    fn tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        let none = || ApiError::wrong("the model has no tokenizer: give token ids");
        self.text.as_ref().ok_or_else(none)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        let tokens = self.tokenizer()?.encode(text, true);
        tokens.map_err(|error| ApiError::argument("prompt", error, "this text"))
    }

    /// Text of tokens; nothing where it cannot be had.
    fn decode(&self, tokens: &[u32]) -> String {
        let text = self.text.as_ref().map(|text| text.decode(tokens, true));
        text.and_then(Result::ok).unwrap_or_default()
    }

    /// A token as text, and its bytes. One that is a part of a character is written `bytes:\xNN...`.
    fn spelled(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.text.as_ref().map(|text| text.spelling(id));
        let bytes = bytes.unwrap_or_default();
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let each = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
                std::iter::once("bytes:".to_owned()).chain(each).collect()
            }
        };
        (text, bytes)
    }
}

/// Compares in a time that does not tell where they differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let differ = a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b));
    a.len() == b.len() && differ == 0
}

/// A request's body.
fn body(bytes: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    bytes.map_err(|rejection| ApiError::of(rejection.status(), rejection.body_text()))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// An id that no other answer of this server has.
fn new_id(kind: &str) -> String {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{kind}-{:x}-{number}", now())
}
