package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// node is the suite in the place of one or more ztunnels: it dials the agent
// under test.
type node struct {
	bench
	pid int // the agent's process, 0 if it can't be seen
}

func newNode(ctx context.Context, o Options) *node { return &node{bench: newBench(ctx, o)} }

// meet starts the agent if that is for us to do, and waits until it listens.
func (n *node) meet() error {
	if len(n.o.Command) > 0 {
		p, err := startProcess(n.o.Command, n.o.Output)
		if err != nil {
			return fmt.Errorf("start the agent: %w", err)
		}
		n.proc = p
	}
	for deadline := time.Now().Add(n.o.Wait); ; {
		ctx, cancel := context.WithTimeout(n.ctx, time.Second)
		conn, peer, err := uds.Dial(ctx, zds.Network, n.o.Path)
		cancel()
		if err == nil {
			n.pid = int(peer.PID)
			return conn.Close()
		}
		if n.proc != nil {
			if status, ended := n.proc.exited(); ended {
				return fmt.Errorf("the agent has exited with status %d; its last words: %s", status, n.proc.tail)
			}
		}
		if n.ctx.Err() != nil {
			return n.ctx.Err()
		}
		if errors.Is(err, uds.ErrUntrusted) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (n *node) end() {
	if n.proc != nil {
		n.proc.stop()
	}
}

// ztunnel is one connection to the agent, in ztunnel's place.
type ztunnel struct {
	n    *node
	conn *net.UnixConn
	done bool // snapshot_sent has come
}

// dial connects and says nothing. The connection ends with the scene.
func (n *node) dial() *ztunnel {
	ctx, cancel := context.WithTimeout(n.ctx, soon)
	defer cancel()
	conn, _, err := uds.Dial(ctx, zds.Network, n.o.Path)
	if err != nil {
		if n.proc != nil {
			if status, ended := n.proc.exited(); ended {
				n.broken("the agent has exited with status %d; its last words: %s", status, n.proc.tail)
			}
		}
		n.broken("%v", err)
	}
	stop := n.watch(conn)
	n.conns = append(n.conns, func() { stop(); conn.Close() })
	return &ztunnel{n: n, conn: conn}
}

// connect dials and says hello.
func (n *node) connect() *ztunnel {
	z := n.dial()
	z.send([]byte{8, 1})
	return z
}

// joined is a ztunnel that has acked its whole snapshot.
func (n *node) joined() *ztunnel {
	z := n.connect()
	z.snapshot()
	return z
}

func (z *ztunnel) send(b []byte, fds ...int) {
	if err := sendPacket(z.conn, b, fds...); err != nil {
		z.n.broken("the agent closed the connection before %s could be sent (%v)", packet{b: b}, err)
	}
}

func (z *ztunnel) ack()             { z.send(encode(zds.Response(""))) }
func (z *ztunnel) nack(text string) { z.send(encode(zds.Response(text))) }

// request is one that came, judged.
type request struct {
	*zds.WorkloadRequest
	text string
	ns   netns.ID // of an add
}

func (r request) uid() string {
	return r.GetAdd().GetUid() + r.GetKeep().GetUid() + r.GetDel().GetUid()
}

// next waits for a request and judges it: its form, its bytes, its descriptors
// and whether it may come now.
func (z *ztunnel) next(within time.Duration, when string) request {
	p, err := z.n.recvWithin(z.conn, within)
	defer p.close()
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			z.n.broken("%s: nothing came within %v", when, within)
		}
		z.n.broken("%s: the connection ended: %v", when, err)
	}
	return z.judge(p)
}

func (z *ztunnel) judge(p packet) request {
	n := z.n
	req, err := zds.ParseRequest(p.b, len(p.fds) > 0)
	if err != nil {
		n.broken("it sent %s, which ztunnel does not read: %v", p, err)
	}
	r := request{WorkloadRequest: req, text: fmt.Sprintf("%s %s", zds.Describe(req), p)}
	// Rebuilt without the fields that ztunnel has no names for.
	known := new(zds.WorkloadRequest)
	proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(p.b, known)
	switch want := encode(known); {
	case len(p.b) > zds.MaxPacket:
		n.broken("%s: ztunnel reads %d bytes at the most", r.text, zds.MaxPacket)
	case string(want) != string(p.b):
		n.broken("%s: these bytes should be [% x]", r.text, want)
	case len(p.fds) > 1:
		n.broken("%s: one descriptor goes with an add", r.text)
	case z.done && req.GetKeep() != nil:
		n.broken("%s: a keep after snapshot_sent, which ends ztunnel", r.text)
	case z.done && req.GetSnapshotSent() != nil:
		n.broken("%s: a second snapshot_sent, which ends ztunnel", r.text)
	case req.GetSnapshotSent() == nil && r.uid() == "":
		n.broken("%s: no uid", r.text)
	}
	z.done = z.done || req.GetSnapshotSent() != nil
	if add := req.GetAdd(); add != nil {
		if add.GetWorkloadInfo() == nil {
			n.broken("%s: no workload_info, which ends ztunnel", r.text)
		}
		ns, err := netns.FromFD(p.fds[0])
		p.fds[0] = -1 // FromFD has taken it over
		if err != nil {
			n.broken("%s: its descriptor is %v", r.text, err)
		}
		r.ns = ns.ID()
		ns.Close()
	}
	return r
}

// snapshot acks all that comes until snapshot_sent, that too, and returns it.
func (z *ztunnel) snapshot() []request { return z.snapshotWith(func(request) { z.ack() }) }

func (z *ztunnel) snapshotWith(answer func(request)) []request {
	var all []request
	for !z.done {
		r := z.next(answerWithin, "in the snapshot")
		all = append(all, r)
		answer(r)
	}
	return all
}

// expect waits for the request that concerns a pod; others (a retry of what
// another scene refused, say) are acked on the way.
func (z *ztunnel) expect(p *pod, when string) request {
	for deadline := time.Now().Add(answerWithin); ; {
		r := z.next(time.Until(deadline), when+" for pod "+p.uid)
		if r.uid() == p.uid {
			return r
		}
		z.ack()
	}
}

// expectAdd waits for the add of a pod, and compares it with what the agent was told.
func (z *ztunnel) expectAdd(p *pod, when string) request {
	r := z.expect(p, when)
	z.n.isAddOf(r, p)
	return r
}

func (n *node) isAddOf(r request, p *pod) {
	i := r.GetAdd().GetWorkloadInfo()
	switch {
	case r.GetAdd() == nil:
		n.broken("an add of pod %s was expected, not %s", p.uid, r.text)
	case i.Name != p.name || i.Namespace != podNamespace || i.ServiceAccount != podServiceAccount:
		n.broken("%s: not name %q, namespace %q, service account %q", r.text, p.name, podNamespace, podServiceAccount)
	case r.ns != p.ns.ID():
		n.broken("%s: its descriptor is %v, the pod's namespace is %v", r.text, r.ns, p.ns.ID())
	}
}

func uids(rs []request) []string {
	var us []string
	for _, r := range rs {
		if u := r.uid(); u != "" {
			us = append(us, u)
		}
	}
	slices.Sort(us)
	return us
}
