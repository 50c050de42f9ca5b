package hbone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

var (
	// ErrClosed is what streams get when their connection is closed by our side.
	ErrClosed = errors.New("the tunnel was closed")
	// ErrPingTimeout is what streams get when the peer no longer answers.
	ErrPingTimeout = errors.New("the tunnel's peer did not answer a ping in time")
	// ErrNotSent says that a request was surely not processed, and that another
	// connection may be tried: the connection was going away, or full.
	ErrNotSent = errors.New("the request was not processed")

	errCancelled = errors.New("the stream was cancelled")
	errTooMany   = fmt.Errorf("%w: as many streams are open as the peer allows", ErrNotSent)
	errGoingAway = fmt.Errorf("%w: the connection is going away", ErrNotSent)
	errEnded     = fmt.Errorf("%w: the connection has ended", ErrNotSent)
)

// HandshakeError is a connection that did not become a tunnel.
type HandshakeError struct {
	Step string // tls or http2
	Err  error
}

func (e *HandshakeError) Error() string { return e.Step + " handshake: " + e.Err.Error() }
func (e *HandshakeError) Unwrap() error { return e.Err }

// StatusError is an answer other than 200.
type StatusError struct{ Status int }

func (e *StatusError) Error() string {
	return fmt.Sprintf("http status: %d %s", e.Status, http.StatusText(e.Status))
}

// CopyError is a failure while bytes were moved, in ztunnel's words.
type CopyError struct {
	Op  string // send or receive
	Err error
}

func (e *CopyError) Error() string { return e.Op + ": " + e.Err.Error() }
func (e *CopyError) Unwrap() error { return e.Err }

// ResetError is a stream that one side reset.
type ResetError struct {
	Code   http2.ErrCode
	Remote bool // the peer did
}

func (e *ResetError) Error() string {
	if e.Remote {
		return "stream error received: " + reason(e.Code)
	}
	return "stream error detected: " + reason(e.Code)
}

// ConnError is a connection that one side ended with a GOAWAY.
type ConnError struct {
	Code   http2.ErrCode
	Remote bool // the peer did
	Detail string
}

func (e *ConnError) Error() string {
	text := "connection error detected: "
	if e.Remote {
		text = "connection error received: "
	}
	text += reason(e.Code)
	if e.Detail != "" {
		text += " (" + e.Detail + ")"
	}
	return text
}

// protocolError is a peer that broke a rule.
func protocolError(code http2.ErrCode, detail string) error {
	return &ConnError{Code: code, Detail: detail}
}

// reason is the code in the words of the real system's log.
func reason(code http2.ErrCode) string {
	if int(code) < len(reasons) {
		return reasons[code]
	}
	return code.String()
}

var reasons = [...]string{
	http2.ErrCodeNo:                 "not a result of an error",
	http2.ErrCodeProtocol:           "unspecific protocol error detected",
	http2.ErrCodeInternal:           "unexpected internal error encountered",
	http2.ErrCodeFlowControl:        "flow-control protocol violated",
	http2.ErrCodeSettingsTimeout:    "settings ACK not received in timely manner",
	http2.ErrCodeStreamClosed:       "received frame when stream half-closed",
	http2.ErrCodeFrameSize:          "frame with invalid size",
	http2.ErrCodeRefusedStream:      "refused stream before processing any application logic",
	http2.ErrCodeCancel:             "stream no longer needed",
	http2.ErrCodeCompression:        "unable to maintain the header compression context",
	http2.ErrCodeConnect:            "connection established in response to a CONNECT request was reset or abnormally closed",
	http2.ErrCodeEnhanceYourCalm:    "detected excessive load generating behavior",
	http2.ErrCodeInadequateSecurity: "security properties do not meet minimum requirements",
	http2.ErrCodeHTTP11Required:     "endpoint requires HTTP/1.1",
}

// endsQuietly tells the errors that are an end of the bytes and no failure: the
// peer, or the application, went away (ztunnel's copy loop).
func endsQuietly(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// unanswered is what a request gets whose connection ended with err.
func unanswered(err error) error {
	if endsQuietly(err) {
		return fmt.Errorf("the tunnel ended before the answer: %w", err)
	}
	return err
}

// cleanReset tells the codes that end a stream as END_STREAM would.
func cleanReset(code http2.ErrCode) bool {
	return code == http2.ErrCodeNo || code == http2.ErrCodeCancel || code == http2.ErrCodeStreamClosed
}

func isTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
