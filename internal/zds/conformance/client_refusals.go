package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"ambient-emulator/internal/zds"
)

// misreading is a packet that can't be read (zds.md §3).
type misreading struct {
	id, says string
	bytes    func(p *pod) []byte
	fds      int
}

func misreadings() []misreading {
	add := func(p *pod) []byte { return encode(p.add()) }
	raw := func(b ...byte) func(*pod) []byte { return func(*pod) []byte { return b } }
	return []misreading{
		{"unknown-member", "an unknown member of the oneof", raw(0x22, 0), 0},
		{"no-payload", "a field of no request, so no payload", raw(0xf8, 1, 1), 0},
		{"hello", "a hello, which is ztunnel's word", raw(8, 1), 0},
		{"garbage", "bytes that are no protobuf", raw(0x0a, 0xff), 0},
		{"truncated", "a del cut short", raw(0x12, 4, 0x12, 2, 'u'), 0},
		{"add-0", "an add without a descriptor", add, 0},
		{"add-2", "an add with two descriptors", add, 2},
		{"add-3", "an add with three descriptors", add, 3},
		{"del-1", "a del with a descriptor", func(p *pod) []byte { return encode(zds.Del(p.uid)) }, 1},
		{"keep-1", "a keep with a descriptor", func(p *pod) []byte { return encode(zds.Keep(p.uid)) }, 1},
		{"snapshot-1", "a snapshot_sent with a descriptor", func(*pod) []byte { return encode(zds.Snapshot()) }, 1},
		{"oversize-keep", "a keep of 1025 bytes", func(p *pod) []byte { return padded(p, zds.MaxPacket+1, false) }, 0},
		{"oversize-add", "an add of 1025 bytes", func(p *pod) []byte { return padded(p, zds.MaxPacket+1, true) }, 1},
		{"oversize-garbage", "8192 bytes of nothing", func(*pod) []byte { return bytes.Repeat([]byte{0xff}, 8192) }, 0},
	}
}

func (a *agent) readTrials() []trial {
	var ts []trial
	for _, m := range misreadings() {
		ts = append(ts, trial{
			Promise{ID: "read-" + m.id, Says: m.says + ": nacked as a read failure, connection dropped and made anew, pods untouched", Source: "zds.md §3, §4"},
			func() { a.misread(m) },
		})
	}
	return append(ts,
		trial{Promise{ID: "read-empty", Says: "an empty packet is the end of the connection: no answer, a new one is made", Source: "zds.md §1, §3"}, a.empty},
		trial{Promise{ID: "nack-size", Says: "a nack fits the agent's 1024 bytes, whatever was sent", Source: "zds.md §1"}, a.nackSize},
	)
}

func (a *agent) misread(m misreading) {
	a.fresh()
	running, p := a.pod(), a.pod()
	before := a.serve(running)
	pid := a.pid
	cause := a.nackRaw(nackRead, m.bytes(p), m.says, a.fds(p, m.fds)...)
	if cause == "" {
		a.broken("the nack names no cause")
	}
	a.ended(a.conn, soon, "after a read failure")
	start := time.Now()
	a.fresh()
	if d := time.Since(start); d > soon {
		a.broken("it dialled again only %v after a read failure", d.Round(time.Millisecond))
	}
	a.sameProcess(pid, "after a read failure")
	running.same(before, "after a read failure")
	a.unserved(p, "a pod of a request that could not be read")
	a.serve(p)
}

// fds is a pod's descriptor n times.
func (a *agent) fds(p *pod, n int) []int { return slices.Repeat([]int{p.ns.FD()}, n) }

func (a *agent) empty() {
	a.fresh()
	running := a.pod()
	before := a.serve(running)
	pid := a.pid
	a.send(nil)
	a.ended(a.conn, soon, "after an empty packet")
	a.fresh()
	a.sameProcess(pid, "after an empty packet")
	running.same(before, "after an empty packet")
}

func (a *agent) nackSize() {
	for _, b := range [][]byte{
		bytes.Repeat([]byte{0xff}, zds.MaxPacket),
		append([]byte{0x22, 0xfd, 0x07}, strings.Repeat("x", zds.MaxPacket-3)...),
	} {
		a.fresh()
		a.nackRaw(nackRead, b, fmt.Sprintf("%d bytes that can't be read", len(b)))
	}
	a.fresh()
	p := a.pod()
	p.occupy(15008)
	// answer looks at the size of each.
	a.nackRaw(nackStart, padded(p, zds.MaxPacket, true), "an add of 1024 bytes whose port is taken", p.ns.FD())
}

func (a *agent) descriptorTrials() []trial {
	return []trial{
		{Promise{ID: "descriptors-refused", Says: "the descriptors of a refused request are closed", Source: "zds.md §3"}, a.descriptorsRefused},
		{Promise{ID: "descriptors-cut", Says: "and so are those of a message that carried three (MSG_CTRUNC)", Source: "zds.md §3", Improvement: true}, a.descriptorsCut},
		{Promise{ID: "descriptors-repeat", Says: "the descriptor of a repeated add is closed", Source: "zds.md §5"}, a.descriptorsRepeat},
		{Promise{ID: "descriptors-del", Says: "a deleted or replaced pod's namespace is held no more", Source: "zds.md §5"}, a.descriptorsDel},
	}
}

func (a *agent) descriptorsRefused() {
	for _, m := range misreadings() {
		if m.fds == 1 || m.fds == 2 {
			a.refusedAndClosed(m)
		}
	}
}

func (a *agent) descriptorsCut() {
	for _, m := range misreadings() {
		if m.fds > 2 {
			a.refusedAndClosed(m)
		}
	}
}

func (a *agent) refusedAndClosed(m misreading) {
	a.fresh()
	a.alive("at first") // who has never heard a good word may dial again less eagerly
	p := a.pod()
	a.send(m.bytes(p), a.fds(p, m.fds)...)
	a.answer(m.says)
	a.fresh()
	a.letGo(a.pid, p.ns.ID(), 0, "after "+m.says)
}

func (a *agent) descriptorsRepeat() {
	a.fresh()
	p := a.pod()
	a.serve(p)
	held := a.descriptors(a.pid, p.ns.ID())
	for range 10 {
		a.ack(p.add(), p.ns.FD())
	}
	a.letGo(a.pid, p.ns.ID(), held, "after ten repeated adds")
}

func (a *agent) descriptorsDel() {
	a.fresh()
	p, q, now := a.pod(), a.pod(), a.pod()
	now.uid = q.uid
	a.snapshot()
	a.serve(p)
	a.serve(q)
	a.ack(zds.Del(p.uid))
	a.letGo(a.pid, p.ns.ID(), 0, "after a del")
	a.serve(now)
	a.letGo(a.pid, q.ns.ID(), 0, "after the same uid came with another namespace")
	failed := a.failed()
	a.ack(zds.Del(failed.uid))
	a.letGo(a.pid, failed.ns.ID(), 0, "after the del of a pod whose start had failed")
}

func (a *agent) exitTrials() []trial {
	const says = ": nacked as a processing failure, and the process exits with status 1"
	return []trial{
		{Promise{ID: "exit-no-info", Says: "an add without workload_info" + says, Source: "zds.md §4"}, a.exitNoInfo},
		{Promise{ID: "exit-keep-late", Says: "a keep after the snapshot" + says, Source: "zds.md §4"}, a.exitKeepLate},
		{Promise{ID: "exit-second-snapshot", Says: "a second snapshot_sent" + says, Source: "zds.md §4"}, a.exitSecondSnapshot},
	}
}

// fatal asks what ends the client.
func (a *agent) fatal(req *zds.WorkloadRequest, cause string, fds ...int) {
	want := fmt.Sprintf("ProtocolError(%q)", cause)
	if got := a.nack(nackProcess, req, fds...); !strings.Contains(got, want) {
		a.broken("%s: the nack's cause is %q, not %s", zds.Describe(req), got, want)
	}
	a.exits(1, "after "+zds.Describe(req))
}

// mortal begins a scene at whose end the client has exited.
func (a *agent) mortal() {
	if len(a.o.Command) == 0 && !a.o.Restarts {
		a.notTried("it ends the client: give the command that starts it after --, or --restarts if somebody else starts it again")
	}
	a.fresh()
}

func (a *agent) exitNoInfo() {
	a.mortal()
	p := a.pod()
	bare := &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: p.uid}}}
	a.fatal(bare, "workload_info is required but not present", p.ns.FD())
	a.unserved(p, "a pod without workload_info")
}

func (a *agent) exitKeepLate() {
	a.mortal()
	a.snapshot()
	a.fatal(zds.Keep(a.prefix+"-nobody"), "pod keep received after snapshot")
}

func (a *agent) exitSecondSnapshot() {
	a.mortal()
	a.snapshot()
	a.fatal(zds.Snapshot(), "pod snapshot received already")
}
