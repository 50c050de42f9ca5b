package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// node is a running agent.
type node struct {
	t    testing.TB
	a    *Agent
	log  *testmain.Log
	stop func()
}

func start(t testing.TB) *node { return startWith(t, Config{}, nil) }

// startWith starts an agent with sockets in a fresh directory, unless cfg names
// some; prepare, if set, may change it before it runs.
func startWith(t testing.TB, cfg Config, prepare func(*Agent)) *node {
	t.Helper()
	n := &node{t: t, log: new(testmain.Log)}
	if cfg.ZDS == "" {
		dir := t.TempDir()
		cfg.ZDS, cfg.Control = filepath.Join(dir, "zds.sock"), filepath.Join(dir, "control.sock")
	}
	cfg.Log = slog.New(slog.NewTextHandler(n.log, nil))
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.a = a
	if prepare != nil {
		prepare(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- a.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("the agent ends with %v", err)
		}
	})
	t.Cleanup(func() {
		n.stop()
		if t.Failed() {
			t.Logf("the agent's log:\n%s", n.log)
		}
	})
	return n
}

// await waits until the log says so.
func (n *node) await(words string) {
	n.t.Helper()
	eventually(n.t, "log: "+words, func() bool { return strings.Contains(n.log.String(), words) })
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

func named(name string) control.PodID {
	return control.PodID{UID: "uid-" + name, Name: name, Namespace: "default", ServiceAccount: "default"}
}

// add asks as the verb does.
func (n *node) add(id control.PodID, ns *netns.NS, wait time.Duration) (notes []string, err error) {
	return n.verb(control.Request{Verb: control.Add, Pod: id, Wait: wait}, ns.FD())
}

// addNow is add with --no-wait: when it returns, the message is queued.
func (n *node) addNow(id control.PodID, ns *netns.NS) {
	n.t.Helper()
	if _, err := n.add(id, ns, 0); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) del(id control.PodID, wait time.Duration) error {
	_, err := n.verb(control.Request{Verb: control.Del, Pod: id, Wait: wait}, fdpass.NoFD)
	return err
}

// list returns the pods by name.
func (n *node) list() map[string]control.Pod {
	n.t.Helper()
	pods := make(map[string]control.Pod)
	if _, err := control.Call(context.Background(), n.a.cfg.Control, control.Request{Verb: control.List}, fdpass.NoFD, func(r control.Reply) {
		pods[r.Pod.Name] = *r.Pod
	}); err != nil {
		n.t.Fatal(err)
	}
	return pods
}

func (n *node) verb(req control.Request, fd int) (notes []string, err error) {
	r, err := control.Call(context.Background(), n.a.cfg.Control, req, fd, func(r control.Reply) { notes = append(notes, r.Note) })
	switch {
	case err != nil:
		return notes, err
	case r.Unconfirmed:
		return notes, fmt.Errorf("%w: %s", errUnconfirmed, r.Error)
	case r.Error != "":
		return notes, errors.New(r.Error)
	}
	return notes, nil
}

// peer is a ztunnel that does what the test says, message by message.
type peer struct {
	t    testing.TB
	conn *zds.Conn
	held []*netns.NS // what came with the adds
	last *zds.WorkloadRequest
}

// dial connects without a word.
func (n *node) dial() *peer {
	n.t.Helper()
	conn, _, err := uds.Dial(context.Background(), zds.Network, n.a.cfg.ZDS)
	if err != nil {
		n.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	p := &peer{t: n.t, conn: zds.NewConn(conn)}
	n.t.Cleanup(p.close)
	return p
}

// ztunnel connects, says hello and acks everything up to and with the snapshot.
func (n *node) ztunnel() *peer {
	n.t.Helper()
	p := n.dial()
	if err := p.conn.SendHello(); err != nil {
		n.t.Fatal(err)
	}
	for {
		words := p.next()
		p.ack()
		if words == "snapshot_sent" {
			break
		}
	}
	eventually(n.t, "the agent knows of the snapshot", func() bool {
		n.a.mu.Lock()
		defer n.a.mu.Unlock()
		return n.a.newest().snapshot
	})
	return p
}

// next returns the next request in a person's words: "add uid=…". The
// namespace of an add is the peer's last one then.
func (p *peer) next() string {
	p.t.Helper()
	req, fd, err := p.conn.ReadRequest()
	if err != nil {
		p.t.Fatalf("read a request: %v", err)
	}
	if fd != fdpass.NoFD {
		ns, err := netns.FromFD(fd)
		if err != nil {
			p.t.Fatal(err)
		}
		p.held = append(p.held, ns)
	}
	p.last = req
	words, _, _ := strings.Cut(zds.Describe(req), " name=")
	return words
}

// expect reads the next request and acks it.
func (p *peer) expect(words string) {
	p.t.Helper()
	if got := p.next(); got != words {
		p.t.Fatalf("got %s, want %s", got, words)
	}
	p.ack()
}

// expectAdd is expect for an add with that namespace.
func (p *peer) expectAdd(name string, ns *netns.NS) {
	p.t.Helper()
	p.nextAdd(name, ns)
	p.ack()
}

func (p *peer) nextAdd(name string, ns *netns.NS) {
	p.t.Helper()
	if got, want := p.next(), fmt.Sprintf("add uid=%q", "uid-"+name); got != want {
		p.t.Fatalf("got %s, want %s", got, want)
	}
	if got := p.held[len(p.held)-1].ID(); got != ns.ID() {
		p.t.Fatalf("add of %s came with %v, want %v", name, got, ns.ID())
	}
}

func (p *peer) ack() { p.nack("") }

func (p *peer) nack(text string) {
	p.t.Helper()
	if err := p.conn.Respond(text); err != nil {
		p.t.Fatalf("answer: %v", err)
	}
}

// gone waits until the agent has closed the connection.
func (p *peer) gone() {
	p.t.Helper()
	if req, _, err := p.conn.ReadRequest(); !zds.Gone(err) {
		p.t.Fatalf("got %v, %v; want the end", req, err)
	}
}

func (p *peer) close() {
	p.conn.Close()
	for _, ns := range p.held {
		ns.Close()
	}
	p.held = nil
}

// acksAll acks whatever comes until the connection ends, and counts.
func (p *peer) acksAll(wg *sync.WaitGroup, seen func(words string)) {
	defer wg.Done()
	for {
		req, fd, err := p.conn.ReadRequest()
		if err != nil {
			if !zds.Gone(err) && !errors.Is(err, io.EOF) {
				p.t.Errorf("read a request: %v", err)
			}
			return
		}
		if fd != fdpass.NoFD {
			unix.Close(fd)
		}
		if seen != nil {
			seen(zds.Describe(req))
		}
		if err := p.conn.Respond(""); err != nil {
			return
		}
	}
}

// fdPath is a path of ns that is good while the test holds it.
func fdPath(ns *netns.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", unix.Getpid(), ns.FD()) }

// manySpaces makes namespaces, lo down, until the test ends.
func manySpaces(t testing.TB, count int) []*netns.NS {
	t.Helper()
	spaces := make([]*netns.NS, count)
	for i := range spaces {
		spaces[i] = netnstest.NewLoDown(t)
	}
	return spaces
}
