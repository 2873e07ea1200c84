//! Errors as OpenAI's interface writes them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::serve::job::{Failure, Refused};

/// An answer that is no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    message: String,
    /// The argument at fault.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A wrong request as a whole.
    pub fn wrong(message: impl Into<String>) -> Self {
        Self::of(StatusCode::BAD_REQUEST, message)
    }

    /// An argument with a wrong value.
    pub fn argument(
        param: &str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        let got = got.to_string();
        let mut shown: String = got.chars().take(80).collect();
        if shown.len() < got.len() {
            shown.push_str("...");
        }
        Self {
            param: Some(param.to_owned()),
            ..Self::wrong(format!("{param}: expected {expected}, got {shown}"))
        }
    }

    /// Another status.
    pub fn of(status: StatusCode, message: impl Into<String>) -> Self {
        let code = match status {
            StatusCode::UNAUTHORIZED => Some("invalid_api_key"),
            StatusCode::TOO_MANY_REQUESTS => Some("rate_limit_exceeded"),
            _ => None,
        };
        Self {
            status,
            message: message.into(),
            param: None,
            code,
        }
    }

    /// More tokens than a sequence may have.
    pub fn too_long(message: String) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::wrong(message)
        }
    }

    /// A model that is not served here.
    pub fn unknown_model(served: &str, got: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            code: Some("model_not_found"),
            ..Self::argument("model", format!("`{served}`"), format!("`{got}`"))
        }
    }

    /// The object that clients read.
    pub fn to_json(&self) -> Value {
        let kind = match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let Self {
            message,
            param,
            code,
            ..
        } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut answer = (self.status, Json(self.to_json())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            answer.headers_mut().insert("retry-after", 1.into());
        }
        answer
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Engine(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Failure::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::of(status, failure.to_string())
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::Full { .. } => StatusCode::TOO_MANY_REQUESTS,
            Refused::TooMany { .. } => StatusCode::BAD_REQUEST,
            Refused::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::of(status, refused.to_string())
    }
}
