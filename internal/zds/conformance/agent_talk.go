package conformance

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"ambient-emulator/internal/zds"
)

// send sends bytes as they are.
func (a *agent) send(b []byte, fds ...int) {
	if err := sendPacket(a.conn, b, fds...); err != nil {
		a.broken("the client closed the connection before it could be asked (%v)", err)
	}
}

// request sends a well-formed request.
func (a *agent) request(req *zds.WorkloadRequest, fds ...int) { a.send(encode(req), fds...) }

func encode(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err) // our own words
	}
	return b
}

// answer waits for the answer to what, and judges its form.
func (a *agent) answer(what string) (nack string) {
	p, err := a.recvWithin(a.conn, answerWithin)
	defer p.close()
	if err != nil {
		a.broken("%s: no answer: %v", what, err)
	}
	switch {
	case len(p.fds) > 0:
		a.broken("%s: the answer came %s", what, p)
	case len(p.b) > zds.MaxPacket:
		a.broken("%s: the answer has %d bytes, more than the %d that the agent can read", what, len(p.b), zds.MaxPacket)
	}
	nack, err = zds.ParseResponse(p.b)
	if err != nil {
		a.broken("%s: the answer %s does not parse: %v", what, p, err)
	}
	if want := encode(zds.Response(nack)); string(want) != string(p.b) {
		a.broken("%s: the answer is %s, which should be [% x]", what, p, want)
	}
	return nack
}

// ack asks, and the answer has to be yes.
func (a *agent) ack(req *zds.WorkloadRequest, fds ...int) {
	a.ackRaw(encode(req), zds.Describe(req), fds...)
}

func (a *agent) ackRaw(b []byte, what string, fds ...int) {
	a.send(b, fds...)
	if nack := a.answer(what); nack != "" {
		a.broken("%s [% .64x]: refused with %q", what, b, nack)
	}
}

// nack asks, and the answer has to be a refusal of that class. It returns the cause.
func (a *agent) nack(class string, req *zds.WorkloadRequest, fds ...int) string {
	return a.nackRaw(class, encode(req), zds.Describe(req), fds...)
}

func (a *agent) nackRaw(class string, b []byte, what string, fds ...int) string {
	a.send(b, fds...)
	got := a.answer(what)
	cause, ok := strings.CutPrefix(got, class)
	if !ok {
		a.broken("%s: %q was expected, the answer is %q", what, class+"…", got)
	}
	return cause
}

// serve adds a pod, which has to go well.
func (a *agent) serve(p *pod) map[int]string {
	a.ack(p.add(), p.ns.FD())
	p.served("after the ack of an add")
	return p.sockets()
}

// snapshot ends the snapshot, which has to go well.
func (a *agent) snapshot() { a.ack(zds.Snapshot()) }

// alive makes sure that the connection still works.
func (a *agent) alive(when string) {
	a.send(encode(zds.Del(a.prefix + "-nobody")))
	if nack := a.answer("del of an unknown uid, " + when); nack != "" {
		a.broken("del of an unknown uid, %s: refused with %q", when, nack)
	}
}

// uidField is a del or keep with its uid in any field.
func uidField(member, field byte, uid string) []byte {
	inner := append([]byte{field<<3 | 2, byte(len(uid))}, uid...)
	return append([]byte{member<<3 | 2, byte(len(inner))}, inner...)
}

// padded is an add, or a keep if name is empty, of exactly n bytes.
func padded(p *pod, n int, withInfo bool) []byte {
	pad := strings.Repeat("x", n)
	for {
		req := zds.Keep(p.uid + pad)
		if withInfo {
			req = zds.Add(p.uid, p.name+pad, podNamespace, podServiceAccount)
		}
		b := encode(req)
		if len(b) == n {
			return b
		}
		if len(b) < n {
			panic(fmt.Sprintf("no message of %d bytes", n))
		}
		pad = pad[1:]
	}
}
