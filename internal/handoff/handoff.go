// Package handoff is the seed's wire: one pod, one connection, one byte.
//
// Over a SOCK_STREAM Unix socket the sender writes 0x01 with exactly one
// descriptor, the pod's network namespace. The receiver answers 0x00 when the
// pod's listeners are ready, or 0x01 and a reason in UTF-8 up to EOF, and
// closes. The answer is our addition: the seed's own sender closes without
// reading it, and the seed's own receiver never gives one. Both work with us.
//
// The real istio-cni and ztunnel speak ZDS instead, and dial the other way.
package handoff

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
)

// The bytes of the wire.
const (
	Add     = 0x01 // sender: here is a pod
	Ready   = 0x00 // receiver: its listeners are ready
	Refused = 0x01 // receiver: no, and why
)

// MaxReason is the most bytes of a reason that either side handles.
const MaxReason = 1024

// What a receiver can hold against a message.
var (
	ErrNoDescriptor = errors.New("no descriptor came with the message")
	ErrSilent       = errors.New("the peer closed without a message")
)

// ErrNotConfirmed is what a sender is left with when the descriptor is on its
// way and no answer came: the seed's own receiver, or one that died or is slow.
var ErrNotConfirmed = errors.New("delivered, not confirmed")

// ErrNotTaken says that the descriptor has not reached anybody: the receiver
// closed with our message unread.
var ErrNotTaken = errors.New("the receiver closed before it took the descriptor")

// RefusedError is the receiver's refusal.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "refused: " + e.Reason }

// Send hands over the namespace behind fd, which stays the caller's.
func Send(conn *net.UnixConn, fd int) error {
	return fdpass.Send(conn, []byte{Add}, fd)
}

// Receive takes one handoff from conn. The descriptor is the caller's and has
// not been judged; on error there is none, and the error may be told to the peer.
func Receive(conn *net.UnixConn) (fd int, err error) {
	// One byte more than the wire has, to notice a peer that speaks something else.
	buf := make([]byte, 2)
	n, fd, err := fdpass.Recv(conn, buf)
	if errors.Is(err, io.EOF) {
		err = ErrSilent
	}
	if err != nil {
		return fdpass.NoFD, err
	}
	if err := checkMessage(buf[:n], fd != fdpass.NoFD); err != nil {
		if fd != fdpass.NoFD {
			unix.Close(fd)
		}
		return fdpass.NoFD, err
	}
	return fd, nil
}

// checkMessage judges what a sender wrote.
func checkMessage(b []byte, withFD bool) error {
	switch {
	case len(b) != 1 || b[0] != Add:
		return fmt.Errorf("the message starts with %#x; a handoff is one byte, %#02x", b, Add)
	case !withFD:
		return ErrNoDescriptor
	}
	return nil
}

// Reply answers the sender: ready when refusal is nil, else its text. A sender
// that has gone already is no error of ours; the caller may ignore EPIPE.
func Reply(conn *net.UnixConn, refusal error) error {
	return fdpass.Send(conn, encodeReply(refusal), fdpass.NoFD)
}

// encodeReply puts an answer into bytes.
func encodeReply(refusal error) []byte {
	if refusal == nil {
		return []byte{Ready}
	}
	reason := strings.ToValidUTF8(refusal.Error(), "�")
	for len(reason) > MaxReason {
		_, last := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-last]
	}
	return append([]byte{Refused}, reason...)
}

// ReadReply waits for the receiver's answer, as long as conn's read deadline
// allows. It returns nil when the listeners are ready, a *RefusedError, an error
// ErrNotTaken, one that wraps ErrNotConfirmed, or one that says that the answer makes no sense.
func ReadReply(conn *net.UnixConn) error {
	first := make([]byte, 1)
	if _, err := io.ReadFull(conn, first); err != nil {
		// unix(7): who closes with something unread resets the peer.
		if errors.Is(err, unix.ECONNRESET) {
			return ErrNotTaken
		}
		return fmt.Errorf("%w: %w", ErrNotConfirmed, err) // EOF or a deadline
	}
	if first[0] != Refused {
		return decodeReply(first)
	}
	// A reason cut short is still a refusal.
	reason, _ := io.ReadAll(io.LimitReader(conn, MaxReason))
	return decodeReply(append(first, reason...))
}

// decodeReply judges an answer of at least one byte.
func decodeReply(b []byte) error {
	switch b[0] {
	case Ready:
		return nil
	case Refused:
		return &RefusedError{Reason: printable(b[1:])}
	}
	return fmt.Errorf("the answer starts with %#02x; %#02x (ready) and %#02x (refused) are known", b[0], Ready, Refused)
}

// printable makes a peer's words safe for a terminal and one line long.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, string(b))
}
