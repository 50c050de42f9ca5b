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
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"slices"
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
	fields []byte // those of With, as they stand in a line
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
	c.fields = slices.Clip(h.fields)
	for _, a := range attrs {
		if target, ok := h.targetIn(a); ok {
			c.target = target
		}
		c.fields = c.appendField(c.fields, h.prefix, a)
	}
	return &c
}

// targetIn returns the target, if that is what the attribute says.
func (h *handler) targetIn(a slog.Attr) (string, bool) {
	if a.Key != Target || h.prefix != "" || a.Value.Kind() != slog.KindString {
		return "", false
	}
	return a.Value.String(), true
}

// lines are buffers to write a line into: there is one for each connection, and one
// before each ack.
var lines = sync.Pool{New: func() any { return new([]byte) }}

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	target := h.target
	for a := range r.Attrs {
		if t, ok := h.targetIn(a); ok {
			target = t
		}
	}
	buf := lines.Get().(*[]byte)
	defer lines.Put(buf)
	b := h.appendHead((*buf)[:0], r, target)
	b = append(b, h.fields...)
	for a := range r.Attrs {
		b = h.appendField(b, h.prefix, a)
	}
	b = h.appendEnd(b)
	*buf = b

	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := h.out.w.Write(b)
	return err
}

const timeFormat = "2006-01-02T15:04:05.000000Z"

// appendHead appends what stands before the fields.
func (h *handler) appendHead(b []byte, r slog.Record, target string) []byte {
	if h.opts.JSON {
		b = append(append(b, `{"level":"`...), level(r.Level)...)
		b = append(r.Time.UTC().AppendFormat(append(b, `","time":"`...), timeFormat), `","scope":`...)
		return appendQuoted(append(appendQuoted(b, target), `,"message":`...), r.Message)
	}
	b = append(r.Time.UTC().AppendFormat(b, timeFormat), '\t')
	b = append(append(b, level(r.Level)...), '\t')
	b = append(append(b, strings.TrimPrefix(target, crate)...), '\t')
	return append(append(b, oneLine(r.Message)...), '\t')
}

// appendField appends an attribute: a group's members with their names joined by
// dots, and not the target, which has a place of its own.
func (h *handler) appendField(b []byte, prefix string, a slog.Attr) []byte {
	a.Value = a.Value.Resolve()
	if _, ok := h.targetIn(a); ok && prefix == "" {
		return b
	}
	if a.Value.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, m := range a.Value.Group() {
			b = h.appendField(b, prefix, m)
		}
		return b
	}
	if a.Key == "" {
		return b
	}
	if h.opts.JSON {
		return appendJSON(append(appendQuoted(append(b, ','), prefix+a.Key), ':'), a.Value)
	}
	b = append(append(append(b, prefix...), a.Key...), '=')
	return append(appendPlain(b, a.Value), ' ')
}

// appendEnd ends the line.
func (h *handler) appendEnd(b []byte) []byte {
	if h.opts.JSON {
		return append(b, "}\n"...)
	}
	return append(bytes.TrimSuffix(b, []byte{' '}), '\n') // after the last field
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

// appendPlain appends a value in quotes if it is a string, or reads like one: errors
// and durations.
func appendPlain(b []byte, v slog.Value) []byte {
	switch v.Kind() {
	case slog.KindString:
		return appendString(b, v.String())
	case slog.KindDuration:
		return appendString(b, v.Duration().String())
	case slog.KindTime:
		return v.Time().UTC().AppendFormat(b, time.RFC3339Nano)
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10)
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10)
	}
	switch x := v.Any().(type) {
	case error:
		return appendString(b, x.Error())
	case netip.AddrPort:
		return x.AppendTo(b)
	}
	return append(b, v.String()...)
}

// appendString appends a string in quotes. Most have nothing to escape.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return strconv.AppendQuote(b, s)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// appendJSON appends a number or a boolean as it is; everything else is a string.
func appendJSON(b []byte, v slog.Value) []byte {
	switch v.Kind() {
	case slog.KindInt64, slog.KindUint64, slog.KindBool:
		return append(b, v.String()...)
	case slog.KindFloat64:
		if s, err := json.Marshal(v.Float64()); err == nil {
			return append(b, s...)
		}
	}
	switch x := v.Any().(type) {
	case error:
		return appendQuoted(b, x.Error())
	case Bare:
		return appendQuoted(b, string(x))
	}
	return appendQuoted(b, v.String())
}

// appendQuoted appends a string in JSON.
func appendQuoted(b []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil {
		return append(b, `""`...)
	}
	return append(b, quoted...)
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
