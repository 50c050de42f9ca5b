package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// inPod are the parts of this program that run in a pod, by the first word of
// the command line.
var inPod = map[string]func(args []string) error{
	"server": serveTraffic,
	"client": makeTraffic,
	"relay":  relayFloor,
	"limit":  relayLimit,
}

// The server's ports.
const (
	sinkPort = 9001 // takes everything, and says how much it was
	echoPort = 9002 // sends back each KiB
	onePort  = 9003 // answers one byte with one, and closes first
)

const (
	tripSize   = 1 << 10
	connecting = 8 // clients at once that do nothing but connect
)

// serveTraffic is the application in the server's pod.
func serveTraffic([]string) error {
	for port, serve := range map[int]func(net.Conn) error{sinkPort: sink, echoPort: echo, onePort: answerOne} {
		// Plain TCP, as everything here: no MPTCP.
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		l, err := config.Listen(context.Background(), "tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go acceptAll(l, serve)
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, unix.SIGTERM)
	fmt.Fprintln(os.Stderr, "serving")
	<-terminated
	return nil
}

func acceptAll(l net.Listener, serve func(net.Conn) error) {
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "accept:", err)
			return
		}
		go serveOne(c, serve)
	}
}

func serveOne(c net.Conn, serve func(net.Conn) error) {
	defer c.Close()
	if err := serve(c); err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "serve:", err)
	}
}

func sink(c net.Conn) error {
	buf := make([]byte, 256<<10)
	n := uint64(0)
	for {
		m, err := c.Read(buf)
		n += uint64(m)
		if err == io.EOF {
			_, err = c.Write(binary.BigEndian.AppendUint64(nil, n))
			return err
		}
		if err != nil {
			return err
		}
	}
}

func echo(c net.Conn) error {
	buf := make([]byte, tripSize)
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
}

func answerOne(c net.Conn) error {
	buf := make([]byte, 1)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	_, err := c.Write(buf)
	return err
}

// tally is what the client says.
type tally struct {
	Count, Seconds, Failed float64
	P50, P99               float64 // seconds of a round trip
}

// client runs it in its pod.
func (b *bed) client(ctx context.Context, args ...string) (t tally, err error) {
	out, err := b.command(ctx, clientSide.pod(), append([]string{b.self, "client"}, args...)...).Output()
	if err != nil {
		return t, fmt.Errorf("client %v: %w", args, err)
	}
	return t, json.Unmarshal(out, &t)
}

// makeTraffic is `client KIND NUMBER [DURATION]`. The number is of connections, but
// for one kind of round trips.
func makeTraffic(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if args[0] == "idle" {
		return idleConnections(n)
	}
	if args[0] == "trips" {
		return trips(n)
	}
	over, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	var failed atomic.Uint64
	kind := map[string]func(int, time.Time) (uint64, error){
		"stream":        func(_ int, end time.Time) (uint64, error) { return stream(end) },
		"connect":       func(_ int, end time.Time) (uint64, error) { return connects(serverAddr, end, &failed) },
		"connect-apart": func(i int, end time.Time) (uint64, error) { return connects(apartAddr(i), end, &failed) },
	}[args[0]]
	counts, errs := make([]uint64, n), make([]error, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { counts[i], errs[i] = kind(i, start.Add(over)) })
	}
	wg.Wait()
	t := tally{Seconds: time.Since(start).Seconds(), Failed: float64(failed.Load())}
	for _, c := range counts {
		t.Count += float64(c)
	}
	return errors.Join(append(errs, json.NewEncoder(os.Stdout).Encode(t))...)
}

func dialServer(port int) (*net.TCPConn, error) { return dial(serverAddr, port) }

func dial(addr string, port int) (*net.TCPConn, error) {
	dialer := net.Dialer{}
	dialer.SetMultipathTCP(false)
	c, err := dialer.Dial("tcp", net.JoinHostPort(addr, strconv.Itoa(port)))
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// stream sends until the end, and returns how many bytes the server had then.
func stream(end time.Time) (uint64, error) {
	c, err := dialServer(sinkPort)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 128<<10)
	sent := uint64(0)
	for time.Now().Before(end) {
		n, err := c.Write(buf)
		sent += uint64(n)
		if err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	var answer [8]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return 0, err
	}
	if got := binary.BigEndian.Uint64(answer[:]); got != sent {
		return 0, fmt.Errorf("%d bytes sent and %d received", sent, got)
	}
	return sent, nil
}

// trips sends a KiB there and back so many times, one after the other.
func trips(n int) error {
	c, err := dialServer(echoPort)
	if err != nil {
		return err
	}
	defer c.Close()
	times := make(samples, n)
	start := time.Now()
	for i := range times {
		before := time.Now()
		if err := trip(c); err != nil {
			return err
		}
		times[i] = time.Since(before)
	}
	t := tally{Count: float64(n), Seconds: time.Since(start).Seconds(), P50: times.p50().Seconds(), P99: times.p99().Seconds()}
	return json.NewEncoder(os.Stdout).Encode(t)
}

func trip(c net.Conn) error {
	buf := make([]byte, tripSize)
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

// connects returns how many connections to addr there were, one after the other. One
// that fails is counted apart: it shall not cost the run.
func connects(addr string, end time.Time, failed *atomic.Uint64) (n uint64, err error) {
	for time.Now().Before(end) {
		if err := connectOnce(addr); err != nil {
			fmt.Fprintln(os.Stderr, "client:", err)
			failed.Add(1)
			continue
		}
		n++
	}
	return n, nil
}

// connectTimeout is when a connection has failed that hangs.
const connectTimeout = time.Second

// connectOnce leaves no TIME_WAIT on the client's side: the server closes first.
func connectOnce(addr string) error {
	c, err := dial(addr, onePort)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(connectTimeout))
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err == nil && len(answer) != 1 {
		err = fmt.Errorf("%d bytes are no answer", len(answer))
	}
	return err
}

// idleConnections opens n, says so when each has carried a KiB there and back,
// and holds them until nobody wants them any more.
func idleConnections(n int) error {
	for range n {
		c, err := dialServer(echoPort)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := trip(c); err != nil {
			return err
		}
	}
	if _, err := fmt.Println("open"); err != nil {
		return err
	}
	_, err := io.ReadAll(os.Stdin)
	return err
}
