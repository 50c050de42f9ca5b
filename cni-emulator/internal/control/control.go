// Package control is the wire between cni-emulator's verbs and its daemon. It is
// our own; the real agent has nothing like it.
//
// The socket is of kind SOCK_SEQPACKET. A client sends one packet, a Request in
// JSON, with the pod's network namespace as a descriptor if the verb is add. The
// daemon answers with any number of packets, each a Reply in JSON; the last one
// says done, and the daemon closes. Both sides name their version of this wire
// in every packet. A client that leaves early takes nothing back.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/uds"
)

// Network is the kind of socket, in the words of package net.
const Network = "unixpacket"

// Version of the wire.
const Version = 1

// The longest packets, in bytes. A longer one is refused.
const (
	MaxRequest = 16 << 10
	MaxReply   = 128 << 10 // a pod with every ztunnel's longest nack
)

// slack is how long the daemon may take beyond what it was asked to wait.
const slack = 10 * time.Second

// ErrVersion says that the other side speaks another version of this wire.
var ErrVersion = errors.New("the two are of different versions: use one build of cni-emulator for both")

// The verbs.
const (
	Add    = "add"    // Pod and the namespace's descriptor; Wait
	Del    = "del"    // Pod: its UID, or its Name and Namespace; Wait
	List   = "list"   // one Reply a pod
	Status = "status" // one Reply with Agent
)

// Request is what a verb asks.
type Request struct {
	Version int           `json:"version"`
	Verb    string        `json:"verb"`
	Pod     PodID         `json:"pod,omitzero"`
	Wait    time.Duration `json:"wait,omitempty"` // for ztunnel's answer, in nanoseconds; 0 does not wait
}

// PodID is what a person says about a pod.
type PodID struct {
	UID            string `json:"uid"`
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount,omitempty"`
	Path           string `json:"path,omitempty"`       // only remembered; the descriptor is what counts
	Capture        string `json:"capture,omitempty"`    // none, redirect or tproxy; "": as the agent does
	DNSCapture     string `json:"dnsCapture,omitempty"` // true or false; "": as the agent does
}

// Reply is one packet of the daemon's answer.
type Reply struct {
	Version int    `json:"version"`
	Note    string `json:"note,omitempty"` // what it is waiting for; more follows
	Pod     *Pod   `json:"pod,omitempty"`  // more follows
	Agent   *Agent `json:"agent,omitempty"`

	Done        bool   `json:"done,omitempty"`
	Error       string `json:"error,omitempty"`       // with Done
	Unconfirmed bool   `json:"unconfirmed,omitempty"` // with Error: it may yet come true
}

// Pod is a pod as list shows it.
type Pod struct {
	PodID
	NetNS       string     `json:"netns,omitempty"` // as the kernel prints it; "" when its namespace is not at hand
	Inode       uint64     `json:"inode,omitempty"`
	Watched     bool       `json:"watched"` // enrolled by --watch, and leaves when its file goes
	Ztunnels    []Answer   `json:"ztunnels"`
	LastError   string     `json:"lastError,omitempty"`
	LastErrorAt *time.Time `json:"lastErrorAt,omitempty"`
}

// Answer is what a connected ztunnel said about a pod.
type Answer struct {
	Ztunnel int       `json:"ztunnel"` // the connection's number
	PID     int32     `json:"pid"`
	To      string    `json:"to"` // add or keep
	At      time.Time `json:"at"`
	Nack    string    `json:"nack,omitempty"` // "" for an ack
}

// Agent is the daemon as status shows it.
type Agent struct {
	PID      int       `json:"pid"`
	Since    time.Time `json:"since"`
	ZDS      string    `json:"zdsUDS"`
	Control  string    `json:"controlUDS"`
	State    string    `json:"state,omitempty"` // the state file
	Watch    string    `json:"watch,omitempty"`
	NetNS    string    `json:"netns"` // its own
	Pods     int       `json:"pods"`
	Ztunnels []Ztunnel `json:"ztunnels"` // oldest first: the last one gets new pods
}

// Ztunnel is one connected ztunnel.
type Ztunnel struct {
	Ztunnel int       `json:"ztunnel"` // the connection's number: one process may come back
	PID     int32     `json:"pid"`
	UID     uint32    `json:"uid"`
	Since   time.Time `json:"since"`
	State   string    `json:"state"`  // snapshot or ready
	Newest  bool      `json:"newest"` // gets new pods
	Acked   int       `json:"acked"`  // pods
	Nacked  int       `json:"nacked"`
	Queued  int       `json:"queued"` // messages not sent yet
}

// WriteReply sends one packet of an answer.
func WriteReply(conn *net.UnixConn, r Reply) error {
	r.Version = Version
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode reply: %w", err)
	}
	return fdpass.Send(conn, b, fdpass.NoFD)
}

// ReadRequest takes a request. The descriptor that came with it, or fdpass.NoFD,
// is the caller's and has not been judged. An error may be told to the client.
func ReadRequest(conn *net.UnixConn) (req Request, fd int, err error) {
	buf := make([]byte, MaxRequest)
	n, fd, err := fdpass.Recv(conn, buf)
	if err != nil {
		return Request{}, fdpass.NoFD, err
	}
	if err := decode(buf[:n], &req, &req.Version); err != nil {
		if fd != fdpass.NoFD {
			unix.Close(fd)
		}
		return Request{}, fdpass.NoFD, err
	}
	return req, fd, nil
}

// decode looks at the version first: another one may mean anything by the rest.
func decode(b []byte, v any, version *int) error {
	err := json.Unmarshal(b, v)
	if err == nil || *version != 0 {
		if *version != Version {
			return fmt.Errorf("%w (%d here, %d there)", ErrVersion, Version, *version)
		}
	}
	if err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	return nil
}

// Call asks the daemon at path, with fd unless that is fdpass.NoFD; fd stays the
// caller's. It calls each for every reply but the last, which it returns.
func Call(ctx context.Context, path string, req Request, fd int, each func(Reply)) (Reply, error) {
	ctx, cancel := context.WithTimeout(ctx, req.Wait+slack)
	defer cancel()
	conn, _, err := uds.Dial(ctx, Network, path)
	if err != nil {
		return Reply{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	req.Version = Version
	b, err := json.Marshal(req)
	if err != nil {
		return Reply{}, fmt.Errorf("encode request: %w", err)
	}
	if len(b) > MaxRequest {
		return Reply{}, fmt.Errorf("the request has %d bytes; %d are allowed", len(b), MaxRequest)
	}
	// A daemon that is full answers without reading: what it says is worth more
	// than that sending failed.
	sendErr := fdpass.Send(conn, b, fd)
	buf := make([]byte, MaxReply)
	reset := false
	for {
		n, fd, err := fdpass.Recv(conn, buf)
		if errors.Is(err, unix.ECONNRESET) && !reset {
			// The daemon closed without having read us. The kernel says that
			// first; what the daemon said lies behind it.
			reset = true
			continue
		}
		if err == nil && fd != fdpass.NoFD {
			unix.Close(fd)
			err = errors.New("a descriptor came with it")
		}
		var r Reply
		if err == nil {
			err = decode(buf[:n], &r, &r.Version)
		}
		switch {
		case err == nil && r.Done:
			return r, nil
		case err == nil:
			each(r)
		case sendErr != nil:
			return Reply{}, fmt.Errorf("ask the agent at %s: %w", path, sendErr)
		case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET):
			return Reply{}, fmt.Errorf("the agent at %s hung up before it answered; its log says why", path)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return Reply{}, fmt.Errorf("the agent at %s does not answer", path)
		default:
			return Reply{}, fmt.Errorf("the answer of %s: %w", path, err)
		}
	}
}
