// Package accesslog is ztunnel's log line as a slog.Handler, so that what reads
// the real one's log reads ours:
//
//	2026-08-20T10:00:00.123456Z	info	access	connection complete	src.addr=10.0.2.4:41234 direction="outbound" bytes_sent=11
//
// Tabs stand between time, level, target, message and fields. Strings are
// quoted, everything else is bare: an address is given as a netip.AddrPort, a
// duration as the string it shall be.
package accesslog

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Target is the key of the attribute that names a logger's target; it is not
// printed as a field. ztunnel's targets are its module paths: JSON lines keep
// them whole, plain ones leave out crate.
const Target = "target"

// Access is the target of the lines about connections.
const Access = "access"

const crate = "ztunnel::"

// Bare is a string that is printed without quotes, unless it needs them: an address
// that is no netip.AddrPort.
type Bare string

func (b Bare) String() string {
	if strings.ContainsFunc(string(b), needsQuotes) {
		return strconv.Quote(string(b))
	}
	return string(b)
}

// needsQuotes tells what could be taken for another field, or for another line.
func needsQuotes(r rune) bool { return r <= ' ' || r == '"' || r == '=' || r > '~' }

// Levels that slog has no name for.
const (
	LevelTrace = slog.LevelDebug - 4
	LevelOff   = slog.LevelError + 4 // as Options.Level: nothing is printed
)

// Options say how lines look.
type Options struct {
	Level slog.Leveler // the least that is printed; nil is info
	JSON  bool         // one object a line, as with LOG_FORMAT=json
}

// New returns a logger that writes such lines to w, one Write a line.
func New(w io.Writer, o Options) *slog.Logger {
	if o.Level == nil {
		o.Level = slog.LevelInfo
	}
	return slog.New(&handler{out: &output{w: w}, opts: o, target: crate + "app"})
}

// output serialises lines.
type output struct {
	mu sync.Mutex
	w  io.Writer
}

type handler struct {
	out    *output
	opts   Options
	target string
	prefix string // of group names, with the dot
	fields []field
}

type field struct {
	key   string
	value slog.Value
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.opts.Level.Level() }

func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.prefix += name + "."
	return &c
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.fields = append([]field(nil), h.fields...)
	for _, a := range attrs {
		c.add(h.prefix, a)
	}
	return &c
}

// add appends an attribute: a group's members with their names joined by dots,
// the target to its own place.
func (h *handler) add(prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	switch {
	case a.Key == Target && prefix == "" && v.Kind() == slog.KindString:
		h.target = v.String()
	case v.Kind() == slog.KindGroup:
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, m := range v.Group() {
			h.add(prefix, m)
		}
	case a.Key != "":
		h.fields = append(h.fields, field{prefix + a.Key, v})
	}
}

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	line := *h
	line.fields = append([]field(nil), h.fields...)
	r.Attrs(func(a slog.Attr) bool { line.add(h.prefix, a); return true })
	var b strings.Builder
	if h.opts.JSON {
		line.json(&b, r)
	} else {
		line.plain(&b, r)
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := io.WriteString(h.out.w, b.String())
	return err
}

const timeFormat = "2006-01-02T15:04:05.000000Z"

func (h *handler) plain(b *strings.Builder, r slog.Record) {
	fmt.Fprintf(b, "%s\t%s\t%s\t%s\t", r.Time.UTC().Format(timeFormat), level(r.Level), strings.TrimPrefix(h.target, crate), oneLine(r.Message))
	for i, f := range h.fields {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(f.key)
		b.WriteByte('=')
		b.WriteString(plainValue(f.value))
	}
	b.WriteByte('\n')
}

// oneLine escapes what would end the line or move a terminal's cursor: a message
// may have somebody's file name in it.
func oneLine(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}

// plainValue quotes strings, and what reads like one: errors and durations.
func plainValue(v slog.Value) string {
	switch v.Kind() {
	case slog.KindString:
		return strconv.Quote(v.String())
	case slog.KindDuration:
		return strconv.Quote(v.Duration().String())
	case slog.KindTime:
		return v.Time().UTC().Format(time.RFC3339Nano)
	}
	if err, ok := v.Any().(error); ok {
		return strconv.Quote(err.Error())
	}
	return v.String()
}

func (h *handler) json(b *strings.Builder, r slog.Record) {
	fmt.Fprintf(b, `{"level":%q,"time":%q,"scope":%s,"message":%s`, level(r.Level), r.Time.UTC().Format(timeFormat), quote(h.target), quote(r.Message))
	for _, f := range h.fields {
		fmt.Fprintf(b, ",%s:%s", quote(f.key), jsonValue(f.value))
	}
	b.WriteString("}\n")
}

// jsonValue keeps numbers and booleans; everything else is a string.
func jsonValue(v slog.Value) string {
	switch v.Kind() {
	case slog.KindInt64, slog.KindUint64, slog.KindBool:
		return v.String()
	case slog.KindFloat64:
		if s, err := json.Marshal(v.Float64()); err == nil {
			return string(s)
		}
	}
	if err, ok := v.Any().(error); ok {
		return quote(err.Error())
	}
	return quote(v.String())
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return `""`
	}
	return string(b)
}

// level is ztunnel's word for it.
func level(l slog.Level) string {
	switch {
	case l < slog.LevelDebug:
		return "trace"
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warn"
	}
	return "error"
}
