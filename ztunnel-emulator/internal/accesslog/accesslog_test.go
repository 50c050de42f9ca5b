package accesslog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"
)

func at(l *slog.Logger, buf *bytes.Buffer, level slog.Level, msg string, args ...any) string {
	buf.Reset()
	r := slog.NewRecord(time.Date(2026, 8, 20, 10, 0, 0, 123456789, time.FixedZone("", 7200)), level, msg, 0)
	r.Add(args...)
	l.Handler().Handle(context.Background(), r)
	return buf.String()
}

func TestPlain(t *testing.T) {
	var buf bytes.Buffer
	log := New(&buf, Options{})
	access := log.With(Target, Access)
	addr := netip.MustParseAddrPort("10.0.2.4:41234")
	for _, tt := range []struct{ got, want string }{
		{
			at(access, &buf, slog.LevelInfo, "connection complete", "src.addr", addr, "direction", "outbound", "bytes_sent", 11, "duration", "3ms"),
			"2026-08-20T08:00:00.123456Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.2.4:41234 direction=\"outbound\" bytes_sent=11 duration=\"3ms\"\n",
		},
		{
			at(access, &buf, slog.LevelInfo, "m", "dst.hbone_addr", Bare("web.default.svc:80"), "evil", Bare("a\nb=c")),
			"2026-08-20T08:00:00.123456Z\tinfo\taccess\tm\tdst.hbone_addr=web.default.svc:80 evil=\"a\\nb=c\"\n",
		},
		{
			at(log, &buf, slog.LevelWarn, "no fields"),
			"2026-08-20T08:00:00.123456Z\twarn\tapp\tno fields\t\n",
		},
		{
			at(access.With("a", 1).WithGroup("g").With("b", true), &buf, slog.LevelError, "m", slog.Group("h", "error", errors.New(`say "no"`))),
			"2026-08-20T08:00:00.123456Z\terror\taccess\tm\ta=1 g.b=true g.h.error=\"say \\\"no\\\"\"\n",
		},
		{
			at(log, &buf, slog.LevelInfo, "a\nb\x1b[2J", "quoted", "e\nf"),
			"2026-08-20T08:00:00.123456Z\tinfo\tapp\ta\\nb\\x1b[2J\tquoted=\"e\\nf\"\n",
		},
	} {
		if tt.got != tt.want {
			t.Errorf("got  %q\nwant %q", tt.got, tt.want)
		}
	}
}

func TestJSON(t *testing.T) {
	var buf bytes.Buffer
	log := New(&buf, Options{JSON: true}).With(Target, Access)
	line := at(log, &buf, slog.LevelInfo, "connection complete", "src.addr", netip.MustParseAddrPort("[::1]:5"), "bytes_sent", 11, "error", errors.New("a\tb"), "dst.hbone_addr", Bare(`a "b":8080`))
	var got map[string]any
	if err := json.Unmarshal([]byte(line), &got); err != nil || !strings.HasSuffix(line, "\n") {
		t.Fatalf("%q: %v", line, err)
	}
	for key, want := range map[string]any{
		"level": "info", "time": "2026-08-20T08:00:00.123456Z", "scope": "access", "message": "connection complete",
		"src.addr": "[::1]:5", "bytes_sent": 11.0, "error": "a\tb", "dst.hbone_addr": `a "b":8080`,
	} {
		if got[key] != want {
			t.Errorf("%s: %v, want %v", key, got[key], want)
		}
	}
}

// A module's path stands whole in JSON lines only.
func TestTarget(t *testing.T) {
	var buf bytes.Buffer
	for _, tt := range []struct {
		json   bool
		target string
		want   string
	}{
		{false, "ztunnel::inpod", "\tinpod\t"},
		{true, "ztunnel::inpod", `"scope":"ztunnel::inpod"`},
		{false, "", "\tapp\t"},
		{true, "", `"scope":"ztunnel::app"`},
		{true, Access, `"scope":"access"`},
	} {
		log := New(&buf, Options{JSON: tt.json})
		if tt.target != "" {
			log = log.With(Target, tt.target)
		}
		if line := at(log, &buf, slog.LevelInfo, "m"); !strings.Contains(line, tt.want) {
			t.Errorf("%q has no %q", line, tt.want)
		}
	}
}

func TestLevels(t *testing.T) {
	var buf bytes.Buffer
	log := New(&buf, Options{})
	log.Debug("not printed")
	log.Info("printed")
	if !regexp.MustCompile(`^\S+Z\tinfo\tapp\tprinted\t\n$`).MatchString(buf.String()) {
		t.Errorf("got %q", buf.String())
	}
	for l, want := range map[slog.Level]string{slog.LevelDebug - 1: "trace", slog.LevelDebug: "debug", slog.LevelInfo: "info", slog.LevelWarn: "warn", slog.LevelError: "error", 99: "error"} {
		if got := level(l); got != want {
			t.Errorf("%v is %q, want %q", l, got, want)
		}
	}
}

// What With adds twice from one logger does not stand in each other's lines.
func TestWithApart(t *testing.T) {
	var buf bytes.Buffer
	log := New(&buf, Options{}).With("a", 1)
	one, two := log.With("b", 2), log.With("c", 3)
	for _, tt := range []struct {
		log  *slog.Logger
		want string
	}{{log, "\ta=1\n"}, {one, "\ta=1 b=2\n"}, {two, "\ta=1 c=3\n"}} {
		if line := at(tt.log, &buf, slog.LevelInfo, "m"); !strings.HasSuffix(line, tt.want) {
			t.Errorf("got %q, want the end %q", line, tt.want)
		}
	}
}

func BenchmarkLine(b *testing.B) {
	log := New(io.Discard, Options{}).With(Target, Access)
	src, dst := netip.MustParseAddrPort("10.0.2.4:41234"), netip.MustParseAddrPort("10.0.3.4:8080")
	b.ReportAllocs()
	for b.Loop() {
		log.Info("connection complete", "src.addr", src, "dst.addr", dst, "direction", "outbound",
			"bytes_sent", 11, "bytes_recv", 1234, "duration", "3ms")
	}
}
