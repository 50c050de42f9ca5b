package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// zdsInside is ztunnel's half of ZDS in this process, as ztunnel-emulator's
// command line makes it, and the agent's end of its connection.
type zdsInside struct {
	workloads *inpod.Workloads
	agent     *zds.Conn
	cancel    context.CancelFunc
	ran       chan error
	answered  chan time.Duration // each packet that ztunnel sends: the time since it received one
	pods      int
}

func startZDS(socket string) (way, error) {
	log := accesslog.New(io.Discard, accesslog.Options{})
	config := inpod.SocketConfig{IPv6: true, Mark: inpod.DefaultMark, PortReuse: true}
	if err := config.Probe(); err != nil {
		return nil, err
	}
	l, err := uds.Listen(zds.Network, socket)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	workloads, err := inpod.NewWorkloads(config, &proxy.Config{Mark: config.Mark, Log: log}, log)
	if err != nil {
		return nil, err
	}
	z := &zdsInside{workloads: workloads, ran: make(chan error, 1), answered: make(chan time.Duration, 1)}
	// The trace's clock starts when recvmsg(2) has returned and stops when
	// sendmsg(2) has. Tracing decodes the request once more, under a microsecond.
	manager := &inpod.Manager{Path: socket, Workloads: workloads, Readiness: new(inpod.Readiness), Log: log, Trace: z.trace}
	var ctx context.Context
	ctx, z.cancel = context.WithCancel(context.Background())
	go func() { z.ran <- manager.Run(ctx) }()

	l.SetDeadline(time.Now().Add(sendTimeout))
	conn, err := l.AcceptUnix()
	if err != nil {
		z.cancel()
		return nil, errors.Join(err, <-z.ran, workloads.Close(0))
	}
	z.agent = zds.NewConn(conn)
	z.agent.SetDeadline(time.Now().Add(sendTimeout))
	if _, err := z.agent.ReadHello(); err != nil {
		return nil, errors.Join(err, z.stop())
	}
	<-z.answered
	// An empty snapshot: what follows are updates.
	if _, _, err := z.ask(zds.Snapshot(), fdpass.NoFD); err != nil {
		return nil, errors.Join(err, z.stop())
	}
	return z, nil
}

func (z *zdsInside) trace(p zds.Packet) {
	if p.Sent {
		z.answered <- p.After
	}
}

func (z *zdsInside) stop() error {
	z.cancel()
	err := <-z.ran
	return errors.Join(err, z.agent.Close(), z.workloads.Close(0))
}

// ask sends a request and waits for its ack, and returns how long that took here
// and there.
func (z *zdsInside) ask(req *zds.WorkloadRequest, fd int) (whole, alone time.Duration, err error) {
	z.agent.SetDeadline(time.Now().Add(sendTimeout))
	start := time.Now()
	if err := z.agent.SendRequest(req, fd); err != nil {
		return 0, 0, err
	}
	nack, err := z.agent.ReadResponse()
	whole = time.Since(start)
	if err == nil && nack != "" {
		err = errors.New(nack)
	}
	if err != nil {
		return 0, 0, err
	}
	return whole, <-z.answered, nil
}

func (z *zdsInside) handOver(path string) (whole, alone time.Duration, err error) {
	ns, err := netns.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer ns.Close()
	z.pods++
	return z.ask(addRequest(z.pods), ns.FD())
}

// addRequest is an add of the length that a real pod's has.
func addRequest(number int) *zds.WorkloadRequest {
	return zds.Add(fmt.Sprintf("7d1a0fb4-6a45-5d0c-9d7f-%012d", number), fmt.Sprintf("web-%010d-x7k2p", number), "default", "default")
}
