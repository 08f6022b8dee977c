"""Every error treadle raises on purpose, and what each one looks like to a client.

    TreadleError
    +-- UserError                 the client can fix it           400  user
    |   +-- InvalidRequest        a field is wrong                400  user
    |   +-- UnreadableBody        no owner, model or seq readable 400  user
    |   +-- BodyTooLarge          over the size limit             413  user
    |   +-- Unauthenticated       no or unknown key               401  user
    |   |   +-- InvalidToken      an expired or foreign JWT       401  user
    |   +-- TooManyFailedLogins   many unknown keys before      429  user, retryable
    |   +-- Forbidden             known key, not allowed          403  user
    |   +-- NotFound              unknown or foreign id           404  user
    |   +-- SessionFinished       the session was closed          410  user
    |   +-- NotSupported          a feature treadle lacks         400  user
    |   +-- NonFiniteResult       loss or gradient is not finite  400  user
    |   +-- NoGradient            a step without passes           400  user
    +-- ServerError               we must fix it                  500  server
    |   +-- WorkerDied            the worker process ended        500  server
    |   +-- StaleTag              a plan starts from another state 500 server
    |   +-- Fenced                another leader took the lease   500  server
    |   +-- Draining              the server is stopping          503  server, retryable
    |   +-- PoolLoading           a base model is not loaded yet  503  server, retryable
    |   +-- QueueFull             back-pressure on asample        429  server, retryable
    |   +-- Overloaded            no room for the body for long   503  server, retryable
    |   +-- StoreUnavailable      the database does not answer    503  server, retryable
    |   +-- AuthUnavailable       a token cannot be checked now   503  server, retryable
    |   +-- HubUnavailable        a hub gives no file now         503  server, retryable
    |   +-- ResultExpired         a sample's result is gone       410  server, retryable
    +-- ConfigError               the operator must fix it        start-up only

`status` is used for synchronous answers, `category` in the body of a failed future
({"error", "category"}); `retryable` says that the same request may succeed later.
This file imports nothing of ours but `masked`: a message may repeat what a client wrote, and clients write keys where
none belong. A ValueError never leaves a layer untranslated.
"""

from __future__ import annotations

from typing import ClassVar

from treadle.masking import masked


class TreadleError(Exception):
    """Root of the tree. `str(error)` is safe to show to a client: no paths, SQL or secrets."""

    status: ClassVar[int] = 500
    category: ClassVar[str] = "server"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        self.message = masked(message)
        super().__init__(self.message)


class UserError(TreadleError):
    """The client can fix it; the message says what was sent, and the limit or the fix."""

    status = 400
    category = "user"


class InvalidRequest(UserError):
    """A readable request with a value that cannot be honoured."""


class BadParameter(InvalidRequest):
    """InvalidRequest, for the forms of the API whose errors name the field: `param`, None when none is to blame."""

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class UnreadableBody(UserError):
    """The body could not be decoded far enough to know whose request it is."""


class BodyTooLarge(UserError):
    """The body, or what it decompresses to, is over the limit."""

    status = 413


class Unauthenticated(UserError):
    """No key, or a key that nobody holds."""

    status = 401


class InvalidToken(Unauthenticated):
    """A JWT that is not believed (any more). The SDK gets a new one and asks once again."""


class TooManyFailedLogins(UserError):
    """So many unknown keys came from this address that the next one is not looked up for now."""

    status = 429
    retryable = True


class Forbidden(UserError):
    """A known key that may not do this."""

    status = 403


class NotFound(UserError):
    """The id names nothing, or nothing that this tenant may see (the two look the same)."""

    status = 404


class SessionFinished(UserError):
    """The session was finished by its client; heartbeats answer 410 so that they stop."""

    status = 410


class NotSupported(UserError):
    """A feature of the API that this server does not have; the message says which are there."""


class NonFiniteResult(UserError):
    """A loss or a gradient came out as NaN or infinity; nothing of the request was applied."""


class NoGradient(UserError):
    """optim_step with no successful forward_backward since the last step."""


class ServerError(TreadleError):
    """Our fault; the log has the request id."""


class WorkerDied(ServerError):
    """The worker process ended while it held the request."""


class StaleTag(ServerError):
    """A worker was asked to start from a state that it does not hold."""


class Fenced(ServerError):
    """A newer leader holds the lease of the pool; nothing was written."""


class Draining(ServerError):
    """The server is stopping and takes no new work."""

    status = 503
    retryable = True


class PoolLoading(ServerError):
    """The base model's first worker has not reported yet, so requests cannot be checked against it."""

    status = 503
    retryable = True


class QueueFull(ServerError):
    """Back-pressure: too much is queued. Only asample may answer so."""

    status = 429
    retryable = True


class Overloaded(ServerError):
    """There was no room for this request for as long as a client waits; nothing of it was kept."""

    status = 503
    retryable = True


class StoreUnavailable(ServerError):
    """The database does not answer."""

    status = 503
    retryable = True


class AuthUnavailable(ServerError):
    """Whoever knows this token cannot be asked now; nothing is said about the token."""

    status = 503
    retryable = True


class HubUnavailable(ServerError):
    """A hub does not give a file now; it may later."""

    status = 503
    retryable = True


class ResultExpired(ServerError):
    """A sample's result is gone; 410 makes the SDK submit the sample again."""

    status = 410
    retryable = True


class ConfigError(TreadleError):
    """The configuration cannot be started; the message names the setting and the fix."""
