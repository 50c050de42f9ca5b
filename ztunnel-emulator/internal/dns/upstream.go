package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

// outcome is what asking has led to: an answer with the client's id, or why there
// is none.
type outcome struct {
	server netip.AddrPort
	answer []byte
	err    error
}

// declined tells whether another server may know more than this answer.
func (o outcome) declined() bool {
	switch rcodeOf(o.answer) {
	case miekg.RcodeServerFailure, miekg.RcodeNotImplemented, miekg.RcodeRefused:
		return true
	}
	return false
}

// forward asks the servers, each in its turn: at once when one has failed or
// declined, and when its time is up without giving it up, for a slow answer is
// an answer. If all of them decline, the first to do so is heard.
func (f *Forwarder) forward(ctx context.Context, q query, network string) outcome {
	servers := f.Resolvers.Servers
	attempts, turn, total := f.Resolvers.schedule()
	ctx, cancel := context.WithTimeoutCause(ctx, total, fmt.Errorf("no answer within %v", total))
	outcomes := make(chan outcome, len(servers))
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()

	var poor outcome // the best one so far that is not good
	next, open := 0, 0
	for ctx.Err() == nil && (next < len(servers) || open > 0) {
		var turnOver <-chan time.Time
		if next < len(servers) {
			asking.Add(1)
			a := &ask{f.Dial, servers[next], network, q, attempts, turn * time.Duration(len(servers))}
			go a.run(ctx, outcomes, &asking)
			next++
			open++
			turnOver = time.After(turn)
		}
		select {
		case o := <-outcomes:
			open--
			if o.err == nil && !o.declined() {
				return o
			}
			if poor.answer == nil && (o.answer != nil || poor.err == nil) {
				poor = o
			}
		case <-turnOver:
		case <-ctx.Done():
		}
	}
	if poor.answer == nil && poor.err == nil {
		poor.err = errors.New("no resolver to ask")
		if ctx.Err() != nil {
			poor.err = context.Cause(ctx)
		}
	}
	return poor
}

// ask is one server being asked.
type ask struct {
	dial     func(context.Context, string, netip.AddrPort) (net.Conn, error)
	server   netip.AddrPort
	network  string
	query    query
	attempts int           // over UDP
	round    time.Duration // between two of them
}

func (a *ask) run(ctx context.Context, outcomes chan<- outcome, asking *sync.WaitGroup) {
	defer asking.Done()
	o := outcome{server: a.server}
	o.answer, o.err = a.exchange(ctx)
	if o.err != nil {
		o.err = fmt.Errorf("ask %s over %s: %w", a.server, a.network, o.err)
	}
	outcomes <- o
}

// exchange sends the query with an id of its own, which who can't see it has to
// guess, along with the port, and returns the answer with the client's.
func (a *ask) exchange(ctx context.Context) ([]byte, error) {
	conn, err := a.dial(ctx, a.network, a.server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	id := uint16(rand.Uint32()) // ChaCha8, seeded by the kernel
	msg := append([]byte(nil), a.query.msg...)
	setID(msg, id)

	var answer []byte
	if a.network == "udp" {
		answer, err = a.exchangeUDP(ctx, conn, msg)
	} else {
		answer, err = a.exchangeTCP(conn, msg)
	}
	if err != nil {
		return nil, err
	}
	setID(answer, idOf(a.query.msg))
	return answer, nil
}

// exchangeUDP sends again what may be lost. A resolver that is not there is an
// error at once: the socket is connected, so the kernel passes the ICMP message
// on (udp(7)).
func (a *ask) exchangeUDP(ctx context.Context, conn net.Conn, msg []byte) ([]byte, error) {
	// One byte more than the client takes tells that an answer is too large.
	buf := make([]byte, a.query.size+1)
	for attempt := 1; ; attempt++ {
		var again time.Time // after the last one, ctx ends the wait
		if attempt < a.attempts {
			again = time.Now().Add(a.round)
		}
		conn.SetReadDeadline(again)
		if err := context.Cause(ctx); err != nil {
			return nil, err // looked at after the deadline was set: interrupt sets its own later
		}
		if _, err := conn.Write(msg); err != nil {
			return nil, err
		}
		n, err := 0, error(nil)
		for err == nil {
			// Anybody may send to the port: what is no answer is not there.
			if n, err = conn.Read(buf); err == nil && a.query.isAnswer(buf[:n], idOf(msg)) {
				return buf[:n], nil
			}
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, err
		}
	}
}

func (a *ask) exchangeTCP(conn net.Conn, msg []byte) ([]byte, error) {
	if err := writeMessage(conn, msg); err != nil {
		return nil, err
	}
	for {
		answer, err := readMessage(conn)
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the resolver has closed the connection")
		}
		if err != nil {
			return nil, err
		}
		if a.query.isAnswer(answer, idOf(msg)) {
			return answer, nil
		}
	}
}

// interrupt ends every wait at conn once ctx is done, until the function that it
// returns is called.
func interrupt(ctx context.Context, conn net.Conn) (release func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(done)
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}
