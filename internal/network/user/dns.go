package user

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

const (
	// zone is the domain of machines; their bare names are known as well.
	zone = "atoll"
	// A name stays with its machine only as long as that runs.
	nameTTL         = 5
	upstreamTimeout = 2 * time.Second
)

func (s *segment) serveDNS() error {
	at := fullAddress(s.network.Gateway, 53)
	packets, err := gonet.DialUDP(s.stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	listener, err := gonet.ListenTCP(s.stack, at, ipv4.ProtocolNumber)
	if err != nil {
		packets.Close()
		return err
	}
	for _, server := range []*dns.Server{
		{PacketConn: packets, Handler: s.dnsHandler("udp")},
		{Listener: listener, Handler: s.dnsHandler("tcp")},
	} {
		s.running.Go(func() {
			if err := server.ActivateAndServe(); err != nil && s.ctx.Err() == nil {
				s.log.Error("serving names ended", "error", err)
			}
		})
	}
	s.running.Go(func() {
		<-s.ctx.Done()
		packets.Close()
		listener.Close()
	})
	return nil
}

func (s *segment) dnsHandler(transport string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, request *dns.Msg) {
		reply := s.answerDNS(request)
		if reply == nil {
			reply = s.askUpstream(request, transport)
		}
		if transport == "udp" {
			size := dns.MinMsgSize
			if o := request.IsEdns0(); o != nil {
				size = max(size, int(o.UDPSize()))
			}
			reply.Truncate(size)
		}
		w.WriteMsg(reply)
	}
}

// answerDNS knows the machines' names and addresses; nil: it is not for us to say.
func (s *segment) answerDNS(request *dns.Msg) *dns.Msg {
	if len(request.Question) != 1 {
		return new(dns.Msg).SetRcode(request, dns.RcodeFormatError)
	}
	q := request.Question[0]
	name := strings.TrimSuffix(strings.ToLower(q.Name), ".")
	head := func(kind uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: kind, Class: dns.ClassINET, Ttl: nameTTL}
	}
	reply := new(dns.Msg).SetReply(request)
	reply.Authoritative, reply.RecursionAvailable = true, true

	if addr, ok := reverseName(name); ok && s.network.Subnet.Contains(addr) {
		ep := s.find(func(ep *endpoint) bool { return ep.Address == addr })
		if ep == nil {
			reply.Rcode = dns.RcodeNameError
		} else if q.Qtype == dns.TypePTR {
			reply.Answer = []dns.RR{&dns.PTR{Hdr: head(dns.TypePTR), Ptr: dns.Fqdn(strings.ToLower(ep.Name) + "." + zone)}}
		}
		return reply
	}
	bare, ours := strings.CutSuffix(name, "."+zone)
	addrs := s.resolve(bare)
	switch {
	case len(addrs) == 0 && !ours:
		return nil
	case len(addrs) == 0:
		reply.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY:
		for _, a := range addrs {
			reply.Answer = append(reply.Answer, &dns.A{Hdr: head(dns.TypeA), A: a.AsSlice()})
		}
	}
	return reply
}

// resolve returns the addresses of the machines with that name or alias.
func (s *segment) resolve(name string) []netip.Addr {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var addrs []netip.Addr
	for _, ep := range s.endpoints {
		if strings.EqualFold(ep.Name, name) || slices.ContainsFunc(ep.Aliases, func(a string) bool { return strings.EqualFold(a, name) }) {
			addrs = append(addrs, ep.Address)
		}
	}
	return addrs
}

// reverseName reads 4.3.2.1.in-addr.arpa.
func reverseName(name string) (netip.Addr, bool) {
	reversed, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	labels := strings.Split(reversed, ".")
	slices.Reverse(labels)
	addr, err := netip.ParseAddr(strings.Join(labels, "."))
	return addr, err == nil && addr.Is4()
}

// askUpstream asks the host's resolvers one after another, as the machine asked. The helper runs on the host, so a resolver on
// the host's loopback is reached too. The file is read anew each time: the host may have moved to another network.
func (s *segment) askUpstream(request *dns.Msg, transport string) *dns.Msg {
	failure := new(dns.Msg).SetRcode(request, dns.RcodeServerFailure)
	failure.RecursionAvailable = true
	config, err := dns.ClientConfigFromFile(s.resolvConf)
	if err != nil {
		s.log.Warn("reading the host's resolvers failed", "error", err)
		return failure
	}
	client := dns.Client{Net: transport, Timeout: upstreamTimeout, UDPSize: dns.MaxMsgSize}
	for _, server := range config.Servers {
		ctx, cancel := context.WithTimeout(s.ctx, upstreamTimeout)
		reply, _, err := client.ExchangeContext(ctx, request, net.JoinHostPort(server, config.Port))
		cancel()
		if err != nil {
			continue
		}
		if reply.Rcode == dns.RcodeServerFailure || reply.Rcode == dns.RcodeRefused {
			failure = reply
			continue
		}
		return reply
	}
	return failure
}
