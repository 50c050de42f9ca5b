package conformance

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/zds"
)

// fakeZtunnel is the least that keeps all promises of a ztunnel, and breaks one
// of them when it has a fault. It is a process, as the real one is.
type fakeZtunnel struct {
	fault   string
	conn    *net.UnixConn
	running map[string]*fakePod
	pending map[string]*fakePod
	named   map[string]bool
	done    bool // snapshot_sent has come
	retry   time.Time
	leaked  []int
	late    []string // fault del-late: what is closed some time after
	misfit  string   // fault swapped: the answer that belongs to another request
}

type fakePod struct {
	ns    *netns.NS
	socks []int
}

func runFakeZtunnel(path, fault string) {
	z := &fakeZtunnel{fault: fault, running: map[string]*fakePod{}, pending: map[string]*fakePod{}}
	delay := 10 * time.Millisecond
	for {
		conn, err := net.DialUnix(zds.Network, nil, &net.UnixAddr{Net: zds.Network, Name: path})
		if err != nil && z.is("gives-up") {
			os.Exit(3)
		}
		if err == nil {
			z.conn = conn
			start := time.Now()
			z.serve()
			conn.Close()
			if time.Since(start) > 20*time.Millisecond {
				delay = 10 * time.Millisecond
			}
		}
		switch {
		case z.is("tight"):
		case z.is("slow-redial"):
			time.Sleep(soon + time.Second)
		default:
			delay = min(2*delay, 500*time.Millisecond)
			time.Sleep(delay)
		}
	}
}

func (z *fakeZtunnel) is(fault string) bool { return z.fault == fault }

// serve is one connection.
func (z *fakeZtunnel) serve() {
	z.named, z.done = map[string]bool{}, false
	if z.is("set-survives") {
		z.named = fakeNamed
	}
	if !z.is("pending-survives") {
		for uid, p := range z.pending {
			p.ns.Close()
			delete(z.pending, uid)
		}
		z.retry = time.Time{}
	}
	if z.is("reconciles-early") {
		z.reconcile()
	}
	hello := []byte{8, 1}
	if z.is("hello") {
		hello = []byte{8, 2}
	}
	sendPacket(z.conn, hello)
	if z.is("talks") {
		sendPacket(z.conn, []byte{10, 0})
	}
	if z.is("impatient") {
		z.conn.SetReadDeadline(time.Now().Add(time.Second))
	}
	for {
		if !z.is("impatient") {
			z.conn.SetReadDeadline(z.retry)
		}
		p, err := recvPacket(z.conn)
		if errors.Is(err, os.ErrDeadlineExceeded) && !z.is("impatient") {
			z.again()
			continue
		}
		if err != nil {
			if z.is("empty-answers") {
				z.answer(nackRead + "empty")
			}
			if z.is("drops-on-end") {
				z.named = map[string]bool{}
				z.reconcile()
			}
			return
		}
		if !z.take(p) {
			return
		}
	}
}

// fakeNamed outlives a connection, which it should not.
var fakeNamed = map[string]bool{}

func (z *fakeZtunnel) answer(nack string) {
	if z.is("swapped") && nack != "" {
		z.misfit, nack = nack, ""
	} else if z.misfit != "" {
		nack, z.misfit = z.misfit, ""
	}
	b := encode(zds.Response(nack))
	if nack == "" && z.is("ack-bytes") {
		b = []byte{10, 2, 10, 0}
	}
	sendPacket(z.conn, b)
	if z.is("double-ack") {
		sendPacket(z.conn, b)
	}
}

// take judges and serves one packet, and tells whether the connection goes on.
func (z *fakeZtunnel) take(p packet) bool {
	defer p.close()
	req, err := zds.ParseRequest(p.b, len(p.fds) == 1)
	switch limit := z.limit(); {
	case len(p.fds) > 1:
		err = fmt.Errorf("Expected 1 FD, got %d", len(p.fds))
	case len(p.b) > limit:
		err = errors.New("received truncated message")
	}
	if err == nil {
		return z.handle(req, &p)
	}
	if z.is("leaks-refused") || z.is("leaks-cut") && len(p.fds) > 2 {
		z.leaked, p.fds = append(z.leaked, p.fds...), nil
	}
	switch {
	case z.is("reads-anything"):
		z.answer("")
		return true
	case z.is("read-class"):
		z.answer(nackStart + err.Error())
	case z.is("read-exits"):
		z.answer(nackRead + err.Error())
		os.Exit(1)
	case z.is("read-stays"):
		z.answer(nackRead + err.Error())
		return true
	case z.is("long-nack"):
		b := encode(&zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: nackRead + strings.Repeat("x", 2000)}}})
		sendPacket(z.conn, b)
	default:
		z.answer(nackRead + fmt.Sprintf("%.100s", err))
	}
	return false
}

func (z *fakeZtunnel) limit() int {
	if z.is("small-buffer") {
		return 512
	}
	return zds.MaxPacket
}

// fatal is a processing failure.
func (z *fakeZtunnel) fatal(cause string) bool {
	switch {
	case z.is("process-class"):
		z.answer(nackRead + cause)
	case z.is("process-cause"):
		z.answer(nackProcess + cause)
	default:
		z.answer(fmt.Sprintf("%sProtocolError(%q)", nackProcess, cause))
	}
	switch {
	case z.is("process-stays"):
		return true
	case z.is("exits-2"):
		os.Exit(2)
	}
	os.Exit(1)
	return false
}

func (z *fakeZtunnel) handle(req *zds.WorkloadRequest, p *packet) bool {
	switch r := req.Payload.(type) {
	case *zds.WorkloadRequest_Add:
		if r.Add.WorkloadInfo == nil {
			return z.fatal("workload_info is required but not present")
		}
		if z.is("needs-name") && r.Add.WorkloadInfo.Name == "" {
			z.answer(nackStart + "no name")
			return true
		}
		fd := p.fds[0]
		p.fds = nil
		return z.add(r.Add.Uid, fd)
	case *zds.WorkloadRequest_Keep:
		if z.done {
			return z.fatal("pod keep received after snapshot")
		}
		uid := r.Keep.Uid
		if z.is("any-field") && uid == "" {
			uid = strayUID(r.Keep.ProtoReflect().GetUnknown())
		}
		if z.is("keep-known") && z.running[uid] == nil {
			z.answer(nackStart + "unknown")
			return true
		}
		z.named[uid] = true
	case *zds.WorkloadRequest_Del:
		uid := r.Del.Uid
		if z.is("any-field") && uid == "" {
			uid = strayUID(r.Del.ProtoReflect().GetUnknown())
		}
		if z.is("del-known") && z.running[uid] == nil {
			z.answer(nackStart + "unknown")
			return true
		}
		z.del(uid)
	case *zds.WorkloadRequest_SnapshotSent:
		if z.done {
			return z.fatal("pod snapshot received already")
		}
		z.done = true
		if !z.is("no-reconcile") {
			z.reconcile()
		}
		z.named = map[string]bool{}
		if z.is("snapshot-unpends") {
			z.pending = map[string]*fakePod{}
		}
	}
	z.answer("")
	return true
}

// strayUID finds a uid of short length in a field that it does not belong in.
func strayUID(b []byte) string {
	if len(b) < 2 {
		return ""
	}
	return string(b[2:])
}
